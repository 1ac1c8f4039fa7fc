use proptest::prelude::*;

use super::*;

fn namespace() -> Namespace {
    Namespace {
        model: "meta-llama/Llama-3.1-8B".into(),
        revision: "main".into(),
        kv_dtype: "bf16".into(),
        block_tokens: 16,
        adapter: "lora@1".into(),
        modality: Modality::Audio,
        cache_group: 3,
        public: true,
    }
}

fn on_the_wire() -> wire::Namespace {
    (&namespace()).into()
}

fn refusal(change: impl FnOnce(&mut wire::Namespace)) -> String {
    let mut wire = on_the_wire();
    change(&mut wire);
    Namespace::try_from(wire).unwrap_err().to_string()
}

#[test]
fn a_namespace_comes_back_as_it_went() {
    assert_eq!(Namespace::try_from(on_the_wire()), Ok(namespace()));
    for modality in [Modality::Text, Modality::Image, Modality::Audio, Modality::Video] {
        let namespace = Namespace { modality, ..namespace() };
        assert_eq!(Namespace::try_from(wire::Namespace::from(&namespace)), Ok(namespace));
    }
}

#[test]
fn each_limit_of_a_namespace_is_named_with_the_value_that_broke_it() {
    assert_eq!(refusal(|wire| wire.model.clear()), "namespace.model has 0 bytes, but must have 1 to 256");
    assert_eq!(refusal(|wire| wire.model = "m".repeat(257)), "namespace.model has 257 bytes, but must have 1 to 256");
    assert_eq!(
        refusal(|wire| wire.revision = "r".repeat(129)),
        "namespace.revision has 129 bytes, but must have 0 to 128"
    );
    assert_eq!(
        refusal(|wire| wire.adapter = "a".repeat(257)),
        "namespace.adapter has 257 bytes, but must have 0 to 256"
    );
    assert_eq!(
        refusal(|wire| wire.kv_dtype = "fp16".into()),
        "kv_dtype is `fp16`, but must be one of f32 f16 bf16 f8_e4m3 f8_e5m2 i8 u8"
    );
    assert_eq!(refusal(|wire| wire.block_tokens = 0), "namespace.block_tokens is 0, but must be 1 to 4096");
    assert_eq!(refusal(|wire| wire.block_tokens = 4097), "namespace.block_tokens is 4097, but must be 1 to 4096");
    assert_eq!(refusal(|wire| wire.cache_group = 64), "namespace.cache_group is 64, but must be 0 to 63");
    assert_eq!(refusal(|wire| wire.modality = 4), "namespace.modality is 4, which this version does not know");
    assert_eq!(refusal(|wire| wire.modality = -1), "namespace.modality is -1, which this version does not know");
    let mut largest = on_the_wire();
    (largest.model, largest.revision, largest.adapter) = ("m".repeat(256), "r".repeat(128), "a".repeat(256));
    (largest.block_tokens, largest.cache_group) = (4096, 63);
    assert!(Namespace::try_from(largest).is_ok());
}

#[test]
fn a_layout_comes_back_as_it_went() {
    let base = BlockLayout::attention(32, 8, 128, Dtype::Bf16, 16);
    let mut layouts = vec![base, BlockLayout::latent(61, 576, Dtype::Bf16, 16), BlockLayout::opaque(77)];
    layouts
        .extend([Kind::SlidingWindow, Kind::RecurrentState, Kind::Embedding].map(|kind| BlockLayout { kind, ..base }));
    let rules = [ReuseRule::Trailing { window_tokens: 128 }, ReuseRule::Point, ReuseRule::Content];
    layouts.extend(rules.map(|reuse_rule| BlockLayout { reuse_rule, ..base }));
    for expected in layouts {
        assert_eq!(layout(Some((&expected).into()), &namespace()), Ok(expected));
    }
}

#[test]
fn element_type_and_tokens_of_a_layout_are_the_namespaces() {
    let wire = wire::Layout::from(&BlockLayout::attention(32, 8, 128, Dtype::Bf16, 16));
    let other = Namespace { kv_dtype: "f8_e4m3".into(), block_tokens: 64, ..namespace() };
    let expected = BlockLayout::attention(32, 8, 128, Dtype::F8E4m3, 64);
    assert_eq!(layout(Some(wire), &other), Ok(expected));
}

#[test]
fn each_fault_of_a_layout_is_named() {
    let good = wire::Layout::from(&BlockLayout::attention(32, 8, 128, Dtype::Bf16, 16));
    let refusal = |change: &dyn Fn(&mut wire::Layout)| {
        let mut wire = good;
        change(&mut wire);
        layout(Some(wire), &namespace()).unwrap_err().to_string()
    };
    let heads = |layers, heads| {
        let form = wire::HeadsForm { layers, heads, key_dimensions: 128, value_dimensions: 128 };
        Some(wire::layout::Form::Heads(form))
    };
    assert_eq!(layout(None, &namespace()).unwrap_err().to_string(), "layout is missing");
    assert_eq!(refusal(&|wire| wire.form = None), "layout.form is missing");
    assert_eq!(refusal(&|wire| wire.kind = 9), "layout.kind is 9, which this version does not know");
    assert_eq!(refusal(&|wire| wire.reuse_rule = -3), "layout.reuse_rule is -3, which this version does not know");
    assert_eq!(
        refusal(&|wire| wire.reuse_rule = wire::ReuseRule::ReuseTrailing.into()),
        "layout.window_tokens is 0, but must be 1 to 4294967295"
    );
    assert_eq!(refusal(&|wire| wire.form = heads(0, 8)), "layout.heads.layers is 0, but must be 1 to 4096");
    assert_eq!(
        refusal(&|wire| wire.form = heads(32, u32::MAX)),
        "layout.heads.heads is 4294967295, but must be 1 to 4096"
    );
    assert_eq!(
        refusal(&|wire| wire.form = heads(4096, 4096)),
        "the layout's block bytes is 137438953472, but must be 1 to 67108864"
    );
    let opaque = Some(wire::layout::Form::Opaque(wire::OpaqueForm { block_bytes: u64::MAX }));
    assert_eq!(
        refusal(&|wire| wire.form = opaque),
        "layout.opaque.block_bytes is 18446744073709551615, but must be 1 to 67108864"
    );
}

#[test]
fn keys_and_shards_are_checked() {
    assert_eq!(
        keys("keys", &[0; 40], 1, 9).unwrap_err().to_string(),
        "keys: keys are 32 bytes each, but 40 bytes came; send whole keys end to end"
    );
    assert_eq!(keys("keys", &[], 1, 2).unwrap_err().to_string(), "keys is 0, but must be 1 to 2");
    assert_eq!(keys("keys", &[0; 96], 1, 2).unwrap_err().to_string(), "keys is 3, but must be 1 to 2");
    assert_eq!(keys("keys", &[], 0, 2), Ok(Vec::new()));
    assert_eq!(key("parent", &[0; 31]).unwrap_err().to_string(), "parent has 31 bytes, but must have 32 to 32");
    assert_eq!(key("parent", &[0; 64]).unwrap_err().to_string(), "parent has 64 bytes, but must have 32 to 32");
    assert_eq!(key("parent", &[3; 32]), Ok(BlockKey::from_bytes([3; 32])));
    let layout = BlockLayout::opaque(64);
    assert_eq!(shard(&layout, None), Ok(Shard::WHOLE));
    assert_eq!(shard(&layout, Some(wire::Shard { index: 0, count: 0 })), Ok(Shard::WHOLE));
    let expected = Shard { index: 3, count: 8 };
    assert_eq!(shard(&layout, Some(expected.into())), Ok(expected));
    let error = shard(&layout, Some(wire::Shard { index: u32::MAX, count: u32::MAX })).unwrap_err();
    assert_eq!(error.to_string(), "shard.count is 4294967295, but must be 1 to 64");
}

proptest! {
    #[test]
    fn any_namespace_is_refused_or_comes_back(model in ".{0,80}", revision in ".{0,40}", adapter in ".{0,80}", block_tokens: u32, cache_group in 0u32..100, modality in -1i32..6, public: bool) {
        let kv_dtype = "f16".to_owned();
        let wire = wire::Namespace { model, revision, kv_dtype, block_tokens, adapter, modality, cache_group, public };
        if let Ok(namespace) = Namespace::try_from(wire.clone()) {
            prop_assert_eq!(wire::Namespace::from(&namespace), wire);
        }
    }

    #[test]
    fn any_layout_is_refused_or_comes_back(kind in -1i32..6, reuse_rule in -1i32..6, window_tokens: u32, block_bytes: u64) {
        let form = Some(wire::layout::Form::Opaque(wire::OpaqueForm { block_bytes }));
        let wire = wire::Layout { kind, reuse_rule, window_tokens, form };
        if let Ok(ours) = layout(Some(wire), &namespace()) {
            let again = wire::Layout::from(&ours);
            prop_assert_eq!(layout(Some(again), &namespace()), Ok(ours));
        }
    }
}
