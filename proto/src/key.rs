//! Identity: namespaces, and the chain of block keys rooted in them.
//!
//! ```text
//! salt(tenant)  = BLAKE3 derive_key("tender.v1 tenant salt",  length of secret as u64 LE || secret || name)
//!                                                             32 bytes; public: 32 zero bytes
//! root          = BLAKE3 derive_key("tender.v1 namespace",    salt || field || field …) field = u32 LE length || bytes
//! key(block i)  = BLAKE3 keyed_hash(key = key(block i-1) or root,  tokens as u32 LE || extra)
//! ```
//! A block has exactly `block_tokens` tokens and `block_tokens` is part of the root, so whatever follows the tokens is
//! `extra` (the hash of an image that the tokens stand for, for example) and no two inputs share an encoding.
//! Published test vectors stand in the tests of this file and in `README.md`; a client in another language must meet them.

use std::fmt;
use std::str::FromStr;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

const SALT_CONTEXT: &str = "tender.v1 tenant salt";
const NAMESPACE_CONTEXT: &str = "tender.v1 namespace";

/// Identity of a block: everything from the namespace up to and including it. Also the root of a namespace, the parent of
/// every first block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey([u8; KEY_BYTES]);

/// What separates one tenant's keys from another's.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TenantSalt([u8; 32]);

/// Model state that may be mixed in one chain. See `Namespace` in `kvstore.proto` for limits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Namespace {
    /// Name of the model.
    pub model: String,
    /// Its revision.
    pub revision: String,
    /// Element type of the KV.
    pub kv_dtype: String,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Adapter with its revision; empty for none.
    pub adapter: String,
    /// What the tokens stand for.
    pub modality: Modality,
    /// Group of layers of a hybrid model.
    pub cache_group: u32,
    /// Shared across tenants.
    pub public: bool,
}

/// What the tokens of a chain stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Modality {
    /// Text.
    #[default]
    Text,
    /// Images.
    Image,
    /// Sound.
    Audio,
    /// Moving images.
    Video,
}

/// Why bytes are no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a multiple of 32.
    #[error("keys are {KEY_BYTES} bytes each, but {0} bytes came; send whole keys end to end")]
    Length(usize),
    /// Not 64 hexadecimal digits.
    #[error("`{0}` is no key: 64 hexadecimal digits are")]
    Hex(String),
}

impl BlockKey {
    /// A key from its bytes.
    pub const fn from_bytes(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The key of the block that follows this one and holds `tokens`. `extra` is identity beyond the tokens; mostly empty.
    pub fn child(&self, tokens: &[u32], extra: &[u8]) -> Self {
        /// Covers every block of up to 1024 tokens without a call per token.
        const BATCH_TOKENS: usize = 256;
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        let mut bytes = [0u8; 4 * BATCH_TOKENS];
        for batch in tokens.chunks(BATCH_TOKENS) {
            for (place, token) in bytes.chunks_exact_mut(4).zip(batch) {
                place.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..4 * batch.len()]);
        }
        hasher.update(extra);
        Self(*hasher.finalize().as_bytes())
    }

    /// The keys of all whole blocks of `tokens`, this key being the parent of the first; a rest shorter than a block has no key.
    pub fn chain(&self, tokens: &[u32], block_tokens: u32) -> Vec<Self> {
        let mut parent = *self;
        tokens
            .chunks_exact(block_tokens.max(1) as usize)
            .map(|block| {
                parent = parent.child(block, &[]);
                parent
            })
            .collect()
    }

    /// The first half: enough to tell namespaces apart in records and events.
    pub fn tag(&self) -> [u8; 16] {
        let mut tag = [0; 16];
        tag.copy_from_slice(&self.0[..16]);
        tag
    }

    /// Splits keys laid end to end.
    pub fn split(bytes: &[u8]) -> Result<Vec<Self>, KeyError> {
        if !bytes.len().is_multiple_of(KEY_BYTES) {
            return Err(KeyError::Length(bytes.len()));
        }
        let (keys, _) = bytes.as_chunks::<KEY_BYTES>();
        Ok(keys.iter().copied().map(Self).collect())
    }

    /// Lays keys end to end.
    pub fn join(keys: &[Self]) -> Vec<u8> {
        keys.iter().flat_map(|key| key.0).collect()
    }
}

impl fmt::Display for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockKey({}…)", &self.to_string()[..12])
    }
}

impl FromStr for BlockKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let digits = text.as_bytes();
        let wrong = || KeyError::Hex(text.chars().take(80).collect());
        if digits.len() != 2 * KEY_BYTES {
            return Err(wrong());
        }
        let mut key = [0u8; KEY_BYTES];
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |d: u8| char::from(d).to_digit(16).ok_or_else(wrong);
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Ok(Self(key))
    }
}

impl TenantSalt {
    /// The salt of declared public namespaces.
    pub const PUBLIC: Self = Self([0; 32]);

    /// The salt of a tenant: known to its clients, not to be guessed by others when `secret` is not.
    pub fn of_tenant(secret: &[u8], name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(SALT_CONTEXT);
        hasher.update(&(secret.len() as u64).to_le_bytes());
        hasher.update(secret);
        hasher.update(name.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// A salt from its bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for TenantSalt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantSalt(…)")
    }
}

impl Namespace {
    /// A text namespace of `model` with everything else at its default.
    pub fn text(model: &str, kv_dtype: &str, block_tokens: u32) -> Self {
        Self {
            model: model.to_owned(),
            revision: String::new(),
            kv_dtype: kv_dtype.to_owned(),
            block_tokens,
            adapter: String::new(),
            modality: Modality::Text,
            cache_group: 0,
            public: false,
        }
    }

    /// The parent of every first block. A public namespace has the public salt, whatever the tenant's.
    pub fn root(&self, salt: &TenantSalt) -> BlockKey {
        let salt = if self.public { &TenantSalt::PUBLIC } else { salt };
        let mut hasher = blake3::Hasher::new_derive_key(NAMESPACE_CONTEXT);
        let mut field = |bytes: &[u8]| {
            hasher.update(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            hasher.update(bytes);
        };
        field(&salt.0);
        field(self.model.as_bytes());
        field(self.revision.as_bytes());
        field(self.kv_dtype.as_bytes());
        field(&self.block_tokens.to_le_bytes());
        field(self.adapter.as_bytes());
        field(&(self.modality as u32).to_le_bytes());
        field(&self.cache_group.to_le_bytes());
        field(&[u8::from(self.public)]);
        BlockKey(*hasher.finalize().as_bytes())
    }
}

/// The tokens that stand for block `hash_id` of a trace whose ids are valid in `scope` (a session's id where they are local to it,
/// empty where they are global). Traces carry ids instead of tokens; every replay must derive the same keys from the same id.
///
/// Token `j` is the upper half of `mix(seed + (j + 1) · 0x9e3779b97f4a7c15)` with `mix` the finaliser of SplitMix64 and `seed` the
/// first 8 bytes (LE) of BLAKE3(scope || `hash_id` as u64 LE).
pub fn trace_tokens(scope: &str, hash_id: u64, block_tokens: u32) -> Vec<u32> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(scope.as_bytes());
    hasher.update(&hash_id.to_le_bytes());
    let mut seed = [0; 8];
    seed.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let seed = u64::from_le_bytes(seed);
    (1..=u64::from(block_tokens))
        .map(|j| (crate::sum::mix(seed.wrapping_add(j.wrapping_mul(crate::sum::GOLDEN))) >> 32) as u32)
        .collect()
}

#[cfg(test)]
mod tests;
