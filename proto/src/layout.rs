//! What one block's bytes are: exact sizes, shards, and nothing that does I/O.
//!
//! Canonical order is head-major: `[head][layer][key, value][token][dimension]`. A shard of `n` holds `heads / n` consecutive heads
//! and so is a slice of the block; what was written in 8 shards can be read in 4. A latent (MLA) has one head, is the same on every
//! rank and is stored once.

use std::fmt;

/// Bytes of the largest block: a slot must fit into the smallest segment several times over.
pub const BLOCK_BYTES_MAX: u64 = 64 << 20;

/// Most shards of one block.
pub const SHARDS_MAX: u32 = 64;

/// Element type of the KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the variants are the field's names of number formats")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    F8E4m3,
    F8E5m2,
    I8,
    U8,
}

/// What a block is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Keys and values of attention over the whole context.
    #[default]
    Attention,
    /// Keys and values of attention over a sliding window.
    SlidingWindow,
    /// State of a recurrent layer at the end of the block.
    RecurrentState,
    /// Output of an encoder.
    Embedding,
}

/// How a block is used again; closure and the order of victims follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReuseRule {
    /// Useful only with all blocks before it.
    #[default]
    Prefix,
    /// Useful with the blocks that cover the last tokens, as many as the window has.
    Trailing {
        /// Window in tokens.
        window_tokens: u32,
    },
    /// Useful by itself, at exactly its place.
    Point,
    /// Useful by itself, wherever its content occurs.
    Content,
}

/// The bytes of one block of one group of layers, all shards together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockLayout {
    /// What the block is.
    pub kind: Kind,
    /// How it is used again.
    pub reuse_rule: ReuseRule,
    /// What its bytes are.
    pub form: Form,
}

/// What a block's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Head-major keys and values.
    Heads {
        /// Layers in the group.
        layers: u32,
        /// KV heads; 1 for a latent.
        heads: u32,
        /// Dimensions of a key, per head.
        key_dimensions: u32,
        /// Dimensions of a value, per head; 0 for a latent.
        value_dimensions: u32,
        /// Element type.
        dtype: Dtype,
        /// Tokens in a block.
        block_tokens: u32,
    },
    /// Bytes that Tender does not look into.
    Opaque {
        /// Bytes of a block.
        block_bytes: u64,
    },
}

/// One of `count` equal slices of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    /// Which, from 0.
    pub index: u16,
    /// Of how many.
    pub count: u16,
}

/// A layout or shard that cannot be. Each names the field and its value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A number outside its limits.
    #[error("{field} is {value}, but must be {min} to {max}")]
    Range {
        /// Name on the wire.
        field: &'static str,
        /// What came.
        value: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// Not a number format known here.
    #[error("kv_dtype is `{0}`, but must be one of f32 f16 bf16 f8_e4m3 f8_e5m2 i8 u8")]
    Dtype(String),
    /// Slices would not be equal.
    #[error("shard.count is {count}, but does not divide the {what} of the layout ({value})")]
    Indivisible {
        /// Shards asked for.
        count: u32,
        /// Heads or bytes.
        what: &'static str,
        /// How many of them.
        value: u64,
    },
    /// Nothing has this place.
    #[error("shard.index is {index}, but must be less than shard.count ({count})")]
    ShardIndex {
        /// Which was asked for.
        index: u32,
        /// Of how many.
        count: u32,
    },
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4m3 | Self::F8E5m2 | Self::I8 | Self::U8 => 1,
        }
    }

    /// The name that a namespace gives it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F8E4m3 => "f8_e4m3",
            Self::F8E5m2 => "f8_e5m2",
            Self::I8 => "i8",
            Self::U8 => "u8",
        }
    }

    /// The type of that name.
    pub fn named(name: &str) -> Result<Self, LayoutError> {
        [Self::F32, Self::F16, Self::Bf16, Self::F8E4m3, Self::F8E5m2, Self::I8, Self::U8]
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| LayoutError::Dtype(name.to_owned()))
    }
}

impl Shard {
    /// All of a block.
    pub const WHOLE: Self = Self { index: 0, count: 1 };
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.index, self.count)
    }
}

impl BlockLayout {
    /// Attention whose block is `block_bytes` that Tender does not look into.
    pub const fn opaque(block_bytes: u64) -> Self {
        Self { kind: Kind::Attention, reuse_rule: ReuseRule::Prefix, form: Form::Opaque { block_bytes } }
    }

    /// Full attention with as many dimensions in a value as in a key.
    pub const fn attention(layers: u32, heads: u32, head_dimensions: u32, dtype: Dtype, block_tokens: u32) -> Self {
        let form = Form::Heads {
            layers,
            heads,
            key_dimensions: head_dimensions,
            value_dimensions: head_dimensions,
            dtype,
            block_tokens,
        };
        Self { kind: Kind::Attention, reuse_rule: ReuseRule::Prefix, form }
    }

    /// A latent cache (MLA): `dimensions` per token and layer, one copy for all ranks.
    pub const fn latent(layers: u32, dimensions: u32, dtype: Dtype, block_tokens: u32) -> Self {
        let form =
            Form::Heads { layers, heads: 1, key_dimensions: dimensions, value_dimensions: 0, dtype, block_tokens };
        Self { kind: Kind::Attention, reuse_rule: ReuseRule::Prefix, form }
    }

    /// Bytes of a whole block.
    pub const fn block_bytes(&self) -> u64 {
        match self.form {
            Form::Heads { layers, heads, key_dimensions, value_dimensions, dtype, block_tokens } => {
                layers as u64
                    * heads as u64
                    * (key_dimensions as u64 + value_dimensions as u64)
                    * dtype.bytes()
                    * block_tokens as u64
            }
            Form::Opaque { block_bytes } => block_bytes,
        }
    }

    /// Bytes of one of `count` shards. A count of 0 is read as 1.
    pub const fn shard_bytes(&self, count: u16) -> u64 {
        let count = if count == 0 { 1 } else { count };
        self.block_bytes() / count as u64
    }

    /// Whether every number is within its limits.
    pub fn validate(&self) -> Result<(), LayoutError> {
        let within = |field, value: u64, min, max| {
            if (min..=max).contains(&value) { Ok(()) } else { Err(LayoutError::Range { field, value, min, max }) }
        };
        if let Form::Heads { layers, heads, key_dimensions, value_dimensions, block_tokens, .. } = self.form {
            within("layout.heads.layers", layers.into(), 1, 4096)?;
            within("layout.heads.heads", heads.into(), 1, 4096)?;
            within("layout.heads.key_dimensions", key_dimensions.into(), 1, 65536)?;
            within("layout.heads.value_dimensions", value_dimensions.into(), 0, 65536)?;
            within("namespace.block_tokens", block_tokens.into(), 1, 4096)?;
        }
        if let ReuseRule::Trailing { window_tokens } = self.reuse_rule {
            within("layout.window_tokens", window_tokens.into(), 1, u64::from(u32::MAX))?;
        }
        let field = match self.form {
            Form::Heads { .. } => "the layout's block bytes",
            Form::Opaque { .. } => "layout.opaque.block_bytes",
        };
        within(field, self.block_bytes(), 1, BLOCK_BYTES_MAX)
    }

    /// A shard of this layout, if it can be cut that way. A count of 0 is read as 1.
    pub fn shard(&self, index: u32, count: u32) -> Result<Shard, LayoutError> {
        let count = count.max(1);
        if count > SHARDS_MAX {
            return Err(LayoutError::Range {
                field: "shard.count",
                value: count.into(),
                min: 1,
                max: SHARDS_MAX.into(),
            });
        }
        if index >= count {
            return Err(LayoutError::ShardIndex { index, count });
        }
        let (what, value) = match self.form {
            Form::Heads { heads, .. } => ("heads", u64::from(heads)),
            Form::Opaque { block_bytes } => ("block_bytes", block_bytes),
        };
        if !value.is_multiple_of(count.into()) {
            return Err(LayoutError::Indivisible { count, what, value });
        }
        Ok(Shard { index: index as u16, count: count as u16 })
    }

    /// 64 bits that differ between layouts: seeds sums, so that bytes written under one layout never verify under another.
    pub fn fingerprint(&self) -> u64 {
        let (kind, rule, window) = (self.kind as u64, self.reuse_rule.ordinal(), self.reuse_rule.window_tokens());
        let (form, numbers) = match self.form {
            Form::Heads { layers, heads, key_dimensions, value_dimensions, dtype, block_tokens } => {
                let [layers, heads, block_tokens] = [layers, heads, block_tokens].map(u64::from);
                let dimensions = u64::from(key_dimensions) << 32 | u64::from(value_dimensions);
                (0u64, [layers, heads, dimensions, dtype as u64, block_tokens])
            }
            Form::Opaque { block_bytes } => (1, [block_bytes, 0, 0, 0, 0]),
        };
        [kind, rule, u64::from(window), form]
            .into_iter()
            .chain(numbers)
            .fold(0, |sum: u64, number| crate::sum::mix(sum.wrapping_add(crate::sum::GOLDEN) ^ number))
    }
}

impl ReuseRule {
    /// Number on the wire and on disk.
    pub const fn ordinal(self) -> u64 {
        match self {
            Self::Prefix => 0,
            Self::Trailing { .. } => 1,
            Self::Point => 2,
            Self::Content => 3,
        }
    }

    /// The window of a trailing rule, else 0.
    pub const fn window_tokens(self) -> u32 {
        match self {
            Self::Trailing { window_tokens } => window_tokens,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests;
