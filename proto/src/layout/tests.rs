use proptest::prelude::*;

use super::*;

/// (model, layout of one token, bytes per token): 16-bit KV, from the models' own configurations.
fn models() -> Vec<(&'static str, BlockLayout, u64)> {
    let attention = |layers, heads, dimensions| BlockLayout::attention(layers, heads, dimensions, Dtype::Bf16, 1);
    vec![
        ("Llama-3.1-8B", attention(32, 8, 128), 131_072),
        ("Llama-3.3-70B", attention(80, 8, 128), 327_680),
        ("Llama-3.1-405B", attention(126, 8, 128), 516_096),
        ("Qwen3-8B", attention(36, 8, 128), 147_456),
        ("Qwen3-32B", attention(64, 8, 128), 262_144),
        ("Qwen3-30B-A3B", attention(48, 4, 128), 98_304),
        ("Qwen3-235B-A22B", attention(94, 4, 128), 192_512),
        ("Qwen3-Coder-480B", attention(62, 8, 128), 253_952),
        ("DeepSeek-V3, DeepSeek-R1, Kimi-K2", BlockLayout::latent(61, 576, Dtype::Bf16, 1), 70_272),
        ("gpt-oss-120b, all layers", attention(36, 8, 64), 73_728),
        ("gpt-oss-120b, layers that grow", attention(18, 8, 64), 36_864),
    ]
}

fn with_tokens(layout: BlockLayout, tokens: u32) -> BlockLayout {
    let Form::Heads { layers, heads, key_dimensions, value_dimensions, dtype, .. } = layout.form else { return layout };
    let form = Form::Heads { layers, heads, key_dimensions, value_dimensions, dtype, block_tokens: tokens };
    BlockLayout { form, ..layout }
}

#[test]
fn models_have_their_bytes_per_token() {
    for (model, layout, bytes) in models() {
        assert_eq!(layout.block_bytes(), bytes, "{model}");
        for tokens in [16, 64] {
            let layout = with_tokens(layout, tokens);
            assert_eq!(layout.block_bytes(), bytes * u64::from(tokens), "{model}");
            assert_eq!(layout.validate(), Ok(()), "{model}");
        }
    }
    let llama = BlockLayout::attention(32, 8, 128, Dtype::Bf16, 16);
    assert_eq!((llama.block_bytes(), llama.shard_bytes(8)), (2 << 20, 256 << 10));
    assert_eq!(BlockLayout::attention(32, 8, 128, Dtype::F8E4m3, 16).block_bytes(), 1 << 20);
    assert_eq!(BlockLayout::attention(32, 8, 128, Dtype::F32, 16).block_bytes(), 4 << 20);
}

#[test]
fn a_latent_is_one_for_all_ranks() {
    let latent = BlockLayout::latent(61, 576, Dtype::Bf16, 64);
    assert_eq!(latent.shard(0, 1), Ok(Shard::WHOLE));
    assert_eq!(latent.shard(0, 8), Err(LayoutError::Indivisible { count: 8, what: "heads", value: 1 }));
}

#[test]
fn each_limit_is_named_with_the_value_that_broke_it() {
    let heads = |layers, heads, key_dimensions, value_dimensions, block_tokens| {
        let dtype = Dtype::U8;
        let form = Form::Heads { layers, heads, key_dimensions, value_dimensions, dtype, block_tokens };
        BlockLayout { form, ..BlockLayout::opaque(1) }
    };
    let trailing =
        |window_tokens| BlockLayout { reuse_rule: ReuseRule::Trailing { window_tokens }, ..BlockLayout::opaque(1) };
    let cases = [
        (heads(0, 1, 1, 0, 1), "layout.heads.layers is 0, but must be 1 to 4096"),
        (heads(4097, 1, 1, 0, 1), "layout.heads.layers is 4097, but must be 1 to 4096"),
        (heads(1, 0, 1, 0, 1), "layout.heads.heads is 0, but must be 1 to 4096"),
        (heads(1, 4097, 1, 0, 1), "layout.heads.heads is 4097, but must be 1 to 4096"),
        (heads(1, 1, 0, 0, 1), "layout.heads.key_dimensions is 0, but must be 1 to 65536"),
        (heads(1, 1, 65537, 0, 1), "layout.heads.key_dimensions is 65537, but must be 1 to 65536"),
        (heads(1, 1, 1, 65537, 1), "layout.heads.value_dimensions is 65537, but must be 0 to 65536"),
        (heads(1, 1, 1, 0, 0), "namespace.block_tokens is 0, but must be 1 to 4096"),
        (heads(1, 1, 1, 0, 4097), "namespace.block_tokens is 4097, but must be 1 to 4096"),
        (
            heads(4096, 4096, 65536, 65536, 4096),
            "the layout's block bytes is 9007199254740992, but must be 1 to 67108864",
        ),
        (trailing(0), "layout.window_tokens is 0, but must be 1 to 4294967295"),
        (BlockLayout::opaque(0), "layout.opaque.block_bytes is 0, but must be 1 to 67108864"),
        (BlockLayout::opaque(BLOCK_BYTES_MAX + 1), "layout.opaque.block_bytes is 67108865, but must be 1 to 67108864"),
    ];
    for (layout, expected) in cases {
        assert_eq!(layout.validate().unwrap_err().to_string(), expected);
    }
    for layout in [heads(1, 1, 1, 0, 1), heads(16, 4096, 1, 0, 1024), trailing(1), BlockLayout::opaque(BLOCK_BYTES_MAX)]
    {
        assert_eq!(layout.validate(), Ok(()));
    }
}

#[test]
fn impossible_shards_are_refused() {
    let layout = BlockLayout::attention(2, 8, 16, Dtype::Bf16, 4);
    let text = |index, count| layout.shard(index, count).unwrap_err().to_string();
    assert_eq!(text(0, 65), "shard.count is 65, but must be 1 to 64");
    assert_eq!(text(8, 8), "shard.index is 8, but must be less than shard.count (8)");
    assert_eq!(text(0, 3), "shard.count is 3, but does not divide the heads of the layout (8)");
    assert_eq!(
        BlockLayout::opaque(10).shard(0, 4).unwrap_err().to_string(),
        "shard.count is 4, but does not divide the block_bytes of the layout (10)"
    );
    assert_eq!(layout.shard(0, 0), Ok(Shard::WHOLE), "a count of 0 is read as 1");
    assert_eq!(layout.shard_bytes(0), layout.block_bytes());
}

#[test]
fn dtypes_are_found_by_their_names() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F8E4m3, Dtype::F8E5m2, Dtype::I8, Dtype::U8] {
        assert_eq!(Dtype::named(dtype.name()), Ok(dtype));
    }
    assert_eq!(Dtype::named("BF16"), Err(LayoutError::Dtype("BF16".into())));
}

/// Stored with every block: a change makes all that was stored before a mismatch. Computed apart from this code.
#[test]
fn fingerprints_are_what_they_always_were() {
    let llama = BlockLayout::attention(32, 8, 128, Dtype::Bf16, 16);
    assert_eq!(llama.fingerprint(), 0xe504_f826_930e_beff);
    assert_eq!(BlockLayout::opaque(4096).fingerprint(), 0xff7f_914f_1b81_d57f);
}

#[test]
fn layouts_differ_in_their_fingerprints() {
    let mut layouts: Vec<BlockLayout> = models().into_iter().map(|(_, layout, _)| layout).collect();
    let base = BlockLayout::attention(4, 8, 16, Dtype::Bf16, 32);
    // Same bytes, other meaning.
    layouts.extend([base, BlockLayout::opaque(base.block_bytes())]);
    layouts.extend([(8, 4, 16, 32), (4, 16, 8, 32), (4, 8, 32, 16), (32, 8, 16, 4), (16, 8, 4, 32)].map(
        |(layers, heads, dimensions, tokens)| BlockLayout::attention(layers, heads, dimensions, Dtype::Bf16, tokens),
    ));
    layouts.push(BlockLayout::attention(4, 8, 16, Dtype::F16, 32));
    layouts.push(BlockLayout::latent(4, 256, Dtype::Bf16, 32));
    layouts.push(BlockLayout { kind: Kind::SlidingWindow, ..base });
    layouts.extend(
        [1, 2, 128].map(|window_tokens| BlockLayout { reuse_rule: ReuseRule::Trailing { window_tokens }, ..base }),
    );
    layouts.extend([ReuseRule::Point, ReuseRule::Content].map(|reuse_rule| BlockLayout { reuse_rule, ..base }));
    layouts.extend((1..2000).map(BlockLayout::opaque));
    let count = layouts.len();
    let mut prints: Vec<u64> = layouts.iter().map(BlockLayout::fingerprint).collect();
    prints.sort_unstable();
    prints.dedup();
    assert_eq!(prints.len(), count);
}

proptest! {
    #[test]
    fn shards_cover_a_block_exactly(layers in 1u32..64, heads in 1u32..129, dimensions in 1u32..300, tokens in 1u32..65, count in 1u32..65) {
        let layout = BlockLayout::attention(layers, heads, dimensions, Dtype::Bf16, tokens);
        match layout.shard(0, count) {
            Ok(Shard { count, .. }) => {
                let mut end = 0;
                for index in 0..u32::from(count) {
                    let shard = layout.shard(index, count.into()).unwrap();
                    prop_assert_eq!(u64::from(shard.index) * layout.shard_bytes(count), end);
                    end += layout.shard_bytes(count);
                }
                prop_assert_eq!(end, layout.block_bytes());
            }
            Err(_) => prop_assert!(!heads.is_multiple_of(count)),
        }
    }

    #[test]
    fn what_validates_fits_a_slot(layers: u32, heads: u32, key_dimensions: u32, value_dimensions: u32, block_tokens: u32) {
        let form = Form::Heads { layers, heads, key_dimensions, value_dimensions, dtype: Dtype::F32, block_tokens };
        let layout = BlockLayout { form, ..BlockLayout::opaque(1) };
        if layout.validate().is_ok() {
            prop_assert!((1..=BLOCK_BYTES_MAX).contains(&layout.block_bytes()));
        }
    }
}
