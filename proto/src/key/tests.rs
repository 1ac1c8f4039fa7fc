use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Published vectors: computed apart from this code, with the BLAKE3 package of Python. A client in another language must meet them.
mod vectors {
    pub const SALT: &str = "d3654a345902cfd5acd8a8719af20875aaa6d09e03c74b9057cade8bc9870541";
    pub const ROOT: &str = "faa209ad1152802a984d8d4ff07d92dc7293a2038fc67de6c7738d1eb1fc248b";
    pub const CHAIN: [&str; 3] = [
        "e7bc51d5e82b3bf0e37ea7e6567386fd3578900f694fe58038597d5a1348163f",
        "c8635201dfc06fd8b4c5a86c925a072599fb8e3a64163a5751d5421dc4bc69b7",
        "6e2c3aae0482b84f5c8c5c6d993036f8e0278a981e3319be0e8b7262f76df965",
    ];
    pub const WITH_EXTRA: &str = "0fd778c5d9fa02c9bbd48560a4d0d5e8423b1694ae1feae857c693c39aec4066";
    pub const PUBLIC_ROOT: &str = "2979c2b2286f2b98352424ed121967f6abd8dae9ed7cb41d785b6f4920f929c2";
    pub const PUBLIC_KEY: &str = "362a9c94031104b8354829821f747a15ac1d06a8c267e4dc12704adc50c9217c";
}

fn llama() -> Namespace {
    let revision = "0e9e39f".to_owned();
    Namespace { revision, ..Namespace::text("meta-llama/Llama-3.1-8B-Instruct", "bf16", 16) }
}

fn alice() -> TenantSalt {
    TenantSalt::of_tenant(b"not a secret", "alice")
}

#[test]
fn keys_meet_the_published_vectors() {
    let salt = alice();
    assert_eq!(BlockKey::from_bytes(*salt.as_bytes()).to_string(), vectors::SALT);
    let root = llama().root(&salt);
    assert_eq!(root.to_string(), vectors::ROOT);
    let tokens: Vec<u32> = (0..55).collect();
    let chain = root.chain(&tokens, 16);
    assert_eq!(chain.iter().map(BlockKey::to_string).collect::<Vec<_>>(), vectors::CHAIN);
    assert_eq!(root.child(&tokens[..16], b"image").to_string(), vectors::WITH_EXTRA);
    let public = Namespace {
        revision: "main".to_owned(),
        adapter: "lora-7@3".to_owned(),
        modality: Modality::Image,
        cache_group: 2,
        public: true,
        ..Namespace::text("Qwen/Qwen3-30B-A3B", "f8_e4m3", 64)
    };
    // A public namespace is the same for every tenant.
    for salt in [alice(), TenantSalt::PUBLIC, TenantSalt::of_tenant(b"", "bob")] {
        assert_eq!(public.root(&salt).to_string(), vectors::PUBLIC_ROOT);
    }
    let tokens: Vec<u32> = (0..64).map(|token| u32::MAX - token).collect();
    assert_eq!(public.root(&TenantSalt::PUBLIC).child(&tokens, &[]).to_string(), vectors::PUBLIC_KEY);
}

#[test]
fn tokens_of_a_trace_meet_the_published_vectors() {
    assert_eq!(trace_tokens("", 0, 4), [4240307280, 2055833001, 2135732451, 798007524]);
    assert_eq!(trace_tokens("session-1", 46, 4), [4128152120, 2100039323, 266978876, 2775732420]);
    assert_eq!(trace_tokens("", u64::MAX, 2), [2194079076, 2713079696]);
    assert_eq!(trace_tokens("", 0, 0), []);
}

#[test]
fn every_field_of_a_namespace_is_part_of_its_root() {
    let base = llama();
    let others = [
        base.clone(),
        Namespace { model: "meta-llama/Llama-3.1-8B-Instruc".into(), revision: "t0e9e39f".into(), ..base.clone() },
        Namespace { revision: String::new(), ..base.clone() },
        Namespace { kv_dtype: "f16".into(), ..base.clone() },
        Namespace { block_tokens: 32, ..base.clone() },
        Namespace { adapter: "a".into(), ..base.clone() },
        Namespace { modality: Modality::Audio, ..base.clone() },
        Namespace { cache_group: 1, ..base.clone() },
        Namespace { public: true, ..base },
    ];
    let mut roots: Vec<BlockKey> = others.iter().map(|namespace| namespace.root(&alice())).collect();
    // Length and name of the secret cannot flow into each other.
    roots.extend(
        [(&b"not a secretal"[..], "ice"), (b"", "alice"), (b"not a secret", "bob")]
            .map(|(secret, name)| llama().root(&TenantSalt::of_tenant(secret, name))),
    );
    let count = roots.len();
    roots.sort();
    roots.dedup();
    assert_eq!(roots.len(), count);
}

#[test]
fn a_rest_shorter_than_a_block_has_no_key() {
    let root = llama().root(&alice());
    let tokens: Vec<u32> = (0..47).collect();
    assert_eq!(root.chain(&tokens[..15], 16), []);
    assert_eq!(root.chain(&tokens[..16], 16).len(), 1);
    assert_eq!(root.chain(&tokens, 16).len(), 2);
    assert_eq!(root.chain(&tokens[..3], 0).len(), 3, "0 tokens per block is read as 1, not divided by");
}

#[test]
fn what_is_no_key_is_said_so() {
    assert_eq!(BlockKey::split(&[0; 33]), Err(KeyError::Length(33)));
    for text in ["", "00", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64), &"é".repeat(32), &"+1".repeat(32)] {
        let error = text.parse::<BlockKey>().unwrap_err();
        assert!(error.to_string().contains("64 hexadecimal digits"), "{error}");
    }
    assert!(
        "x".repeat(10_000).parse::<BlockKey>().unwrap_err().to_string().len() < 200,
        "long nonsense is not repeated"
    );
}

#[test]
fn secrets_do_not_show() {
    assert_eq!(format!("{:?}", alice()), "TenantSalt(…)");
}

proptest! {
    #[test]
    fn keys_laid_end_to_end_are_split_again(keys in vec(any::<[u8; KEY_BYTES]>(), 0..20)) {
        let keys: Vec<BlockKey> = keys.into_iter().map(BlockKey::from_bytes).collect();
        prop_assert_eq!(BlockKey::split(&BlockKey::join(&keys)), Ok(keys));
    }

    #[test]
    fn a_key_is_read_as_it_is_written(bytes: [u8; KEY_BYTES]) {
        let key = BlockKey::from_bytes(bytes);
        prop_assert_eq!(key.to_string().parse(), Ok(key));
        prop_assert_eq!(key.to_string().to_uppercase().parse(), Ok(key));
        prop_assert_eq!(&key.tag()[..], &bytes[..16]);
    }

    #[test]
    fn a_chain_is_child_after_child(parent: [u8; KEY_BYTES], tokens in vec(any::<u32>(), 0..3000), block_tokens in 1u32..1100) {
        let mut last = BlockKey::from_bytes(parent);
        let chain = last.chain(&tokens, block_tokens);
        prop_assert_eq!(chain.len(), tokens.len() / block_tokens as usize);
        for (key, block) in chain.iter().zip(tokens.chunks(block_tokens as usize)) {
            last = last.child(block, &[]);
            prop_assert_eq!(*key, last);
            // The same bytes in one piece, past the batches that `child` works in.
            let bytes: Vec<u8> = block.iter().flat_map(|token| token.to_le_bytes()).collect();
            prop_assert_eq!(BlockKey::from_bytes(parent).child(block, &[]), BlockKey::from_bytes(parent).child(&[], &bytes));
        }
    }

    #[test]
    fn another_token_makes_another_chain_from_there_on(tokens in vec(any::<u32>(), 64), at in 0usize..64, flip in 0u32..32) {
        let root = llama().root(&alice());
        let mut others = tokens.clone();
        others[at] ^= 1 << flip;
        let (chain, changed) = (root.chain(&tokens, 16), root.chain(&others, 16));
        let same = at / 16;
        prop_assert_eq!(&chain[..same], &changed[..same]);
        prop_assert!(chain[same..].iter().zip(&changed[same..]).all(|(a, b)| a != b));
    }
}
