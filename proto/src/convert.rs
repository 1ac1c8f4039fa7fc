//! Between the words of the wire and ours. Wire to ours checks every limit, once; ours to wire cannot fail.

use crate::key::{BlockKey, KEY_BYTES, KeyError, Modality, Namespace};
use crate::layout::{BlockLayout, Dtype, Form, Kind, LayoutError, ReuseRule, Shard};
use crate::wire;

/// A message that cannot be meant: names the field, its value and what it must be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// A field that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Text or bytes of the wrong length.
    #[error("{field} has {length} bytes, but must have {min} to {max}")]
    Length {
        /// Name on the wire.
        field: &'static str,
        /// What came.
        length: usize,
        /// Least.
        min: usize,
        /// Most.
        max: usize,
    },
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
    /// A number that no variant has.
    #[error("{field} is {value}, which this version does not know")]
    Unknown {
        /// Name on the wire.
        field: &'static str,
        /// What came.
        value: i32,
    },
    /// Text that is none.
    #[error("{field} is no UTF-8 text: its byte {at} is wrong")]
    Text {
        /// Name on the wire.
        field: &'static str,
        /// Index of the first wrong byte.
        at: usize,
    },
    /// A layout that cannot be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Bytes that are no keys.
    #[error("{field}: {source}")]
    Keys {
        /// Name on the wire.
        field: &'static str,
        /// Why.
        source: KeyError,
    },
}

/// Checks the length of a text or bytes field.
pub fn length(field: &'static str, length: usize, min: usize, max: usize) -> Result<(), FieldError> {
    if (min..=max).contains(&length) { Ok(()) } else { Err(FieldError::Length { field, length, min, max }) }
}

/// One key.
pub fn key(field: &'static str, bytes: &[u8]) -> Result<BlockKey, FieldError> {
    length(field, bytes.len(), KEY_BYTES, KEY_BYTES)?;
    keys(field, bytes, 1, 1).map(|keys| keys[0])
}

/// Keys laid end to end, `min` to `max` of them.
pub fn keys(field: &'static str, bytes: &[u8], min: usize, max: usize) -> Result<Vec<BlockKey>, FieldError> {
    let keys = BlockKey::split(bytes).map_err(|source| FieldError::Keys { field, source })?;
    if !(min..=max).contains(&keys.len()) {
        let [value, min, max] = [keys.len(), min, max].map(|n| n as u64);
        return Err(FieldError::Range { field, value, min, max });
    }
    Ok(keys)
}

/// The shard of a message; none is the whole.
pub fn shard(layout: &BlockLayout, shard: Option<wire::Shard>) -> Result<Shard, FieldError> {
    let shard = shard.unwrap_or(wire::Shard { index: 0, count: 1 });
    Ok(layout.shard(shard.index, shard.count)?)
}

impl TryFrom<wire::Namespace> for Namespace {
    type Error = FieldError;

    fn try_from(wire: wire::Namespace) -> Result<Self, FieldError> {
        length("namespace.model", wire.model.len(), 1, 256)?;
        length("namespace.revision", wire.revision.len(), 0, 128)?;
        length("namespace.adapter", wire.adapter.len(), 0, 256)?;
        Dtype::named(&wire.kv_dtype)?;
        let within = |field, value: u32, min: u64, max: u64| {
            if (min..=max).contains(&value.into()) {
                Ok(())
            } else {
                Err(FieldError::Range { field, value: value.into(), min, max })
            }
        };
        within("namespace.block_tokens", wire.block_tokens, 1, 4096)?;
        within("namespace.cache_group", wire.cache_group, 0, 63)?;
        let modality = match wire.modality() {
            _ if wire::Modality::try_from(wire.modality).is_err() => {
                return Err(FieldError::Unknown { field: "namespace.modality", value: wire.modality });
            }
            wire::Modality::Text => Modality::Text,
            wire::Modality::Image => Modality::Image,
            wire::Modality::Audio => Modality::Audio,
            wire::Modality::Video => Modality::Video,
        };
        Ok(Self {
            model: wire.model,
            revision: wire.revision,
            kv_dtype: wire.kv_dtype,
            block_tokens: wire.block_tokens,
            adapter: wire.adapter,
            modality,
            cache_group: wire.cache_group,
            public: wire.public,
        })
    }
}

impl From<&Namespace> for wire::Namespace {
    fn from(namespace: &Namespace) -> Self {
        let modality = match namespace.modality {
            Modality::Text => Self::modality_number(wire::Modality::Text),
            Modality::Image => Self::modality_number(wire::Modality::Image),
            Modality::Audio => Self::modality_number(wire::Modality::Audio),
            Modality::Video => Self::modality_number(wire::Modality::Video),
        };
        Self {
            model: namespace.model.clone(),
            revision: namespace.revision.clone(),
            kv_dtype: namespace.kv_dtype.clone(),
            block_tokens: namespace.block_tokens,
            adapter: namespace.adapter.clone(),
            modality,
            cache_group: namespace.cache_group,
            public: namespace.public,
        }
    }
}

impl wire::Namespace {
    fn modality_number(modality: wire::Modality) -> i32 {
        modality.into()
    }
}

/// The layout of a message; element type and tokens per block come from the namespace, so the two cannot disagree.
pub fn layout(wire: Option<wire::Layout>, namespace: &Namespace) -> Result<BlockLayout, FieldError> {
    let wire = wire.ok_or(FieldError::Missing("layout"))?;
    let unknown = |field, value| FieldError::Unknown { field, value };
    let kind = match wire::Kind::try_from(wire.kind).map_err(|_| unknown("layout.kind", wire.kind))? {
        wire::Kind::Attention => Kind::Attention,
        wire::Kind::SlidingWindow => Kind::SlidingWindow,
        wire::Kind::RecurrentState => Kind::RecurrentState,
        wire::Kind::Embedding => Kind::Embedding,
    };
    let rule = wire::ReuseRule::try_from(wire.reuse_rule);
    let reuse_rule = match rule.map_err(|_| unknown("layout.reuse_rule", wire.reuse_rule))? {
        wire::ReuseRule::ReusePrefix => ReuseRule::Prefix,
        wire::ReuseRule::ReuseTrailing => ReuseRule::Trailing { window_tokens: wire.window_tokens },
        wire::ReuseRule::ReusePoint => ReuseRule::Point,
        wire::ReuseRule::ReuseContent => ReuseRule::Content,
    };
    let form = match wire.form.ok_or(FieldError::Missing("layout.form"))? {
        wire::layout::Form::Heads(heads) => Form::Heads {
            layers: heads.layers,
            heads: heads.heads,
            key_dimensions: heads.key_dimensions,
            value_dimensions: heads.value_dimensions,
            dtype: Dtype::named(&namespace.kv_dtype)?,
            block_tokens: namespace.block_tokens,
        },
        wire::layout::Form::Opaque(opaque) => Form::Opaque { block_bytes: opaque.block_bytes },
    };
    let layout = BlockLayout { kind, reuse_rule, form };
    layout.validate()?;
    Ok(layout)
}

impl From<&BlockLayout> for wire::Layout {
    fn from(layout: &BlockLayout) -> Self {
        let kind = match layout.kind {
            Kind::Attention => wire::Kind::Attention,
            Kind::SlidingWindow => wire::Kind::SlidingWindow,
            Kind::RecurrentState => wire::Kind::RecurrentState,
            Kind::Embedding => wire::Kind::Embedding,
        };
        let reuse_rule = match layout.reuse_rule {
            ReuseRule::Prefix => wire::ReuseRule::ReusePrefix,
            ReuseRule::Trailing { .. } => wire::ReuseRule::ReuseTrailing,
            ReuseRule::Point => wire::ReuseRule::ReusePoint,
            ReuseRule::Content => wire::ReuseRule::ReuseContent,
        };
        let form = match layout.form {
            Form::Heads { layers, heads, key_dimensions, value_dimensions, .. } => {
                wire::layout::Form::Heads(wire::HeadsForm { layers, heads, key_dimensions, value_dimensions })
            }
            Form::Opaque { block_bytes } => wire::layout::Form::Opaque(wire::OpaqueForm { block_bytes }),
        };
        Self {
            kind: kind.into(),
            reuse_rule: reuse_rule.into(),
            window_tokens: layout.reuse_rule.window_tokens(),
            form: Some(form),
        }
    }
}

impl From<Shard> for wire::Shard {
    fn from(shard: Shard) -> Self {
        Self { index: shard.index.into(), count: shard.count.into() }
    }
}

#[cfg(test)]
mod tests;
