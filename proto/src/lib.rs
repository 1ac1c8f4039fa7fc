//! The contract of Tender: what every process that touches the store must agree on.
//!
//! In reading order: [`key`] (who a block is), [`layout`] (what its bytes are), [`sum`] (how they are known to be right), [`wire`]
//! (how it is all said over gRPC; `kvstore.proto` holds units and limits), [`convert`] (between the two vocabularies), [`ring`] (the
//! memory through which a process on the same node asks), [`door`] (what it says there), [`greeting`] (how it gets there) and
//! [`descriptors`] (what passes between local processes besides bytes).

pub mod convert;
pub mod descriptors;
pub mod door;
pub mod greeting;
pub mod key;
pub mod layout;
pub mod ring;
pub mod sum;

pub use key::{BlockKey, KeyError, Modality, Namespace, TenantSalt, trace_tokens};
pub use layout::{BlockLayout, Dtype, Form, Kind, LayoutError, ReuseRule, Shard};

/// Version of the protocol spoken here; an attach under another is refused.
pub const PROTOCOL_VERSION: u32 = 1;

/// Messages, services and clients generated from `kvstore.proto`, whose comments are their documentation.
#[expect(missing_docs, clippy::allow_attributes, reason = "generated; documented in kvstore.proto")]
pub mod wire {
    tonic::include_proto!("tender.v1");
}
