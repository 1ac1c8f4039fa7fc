//! The contract of Tender: what every process that touches the store must agree on, and nothing that does I/O.
//!
//! In reading order: [`key`] (who a block is), [`layout`] (what its bytes are), [`sum`] (how they are known to be right), [`wire`]
//! (how it is all said over gRPC; `kvstore.proto` holds units and limits), [`convert`] (between the two vocabularies), [`ring`] (the
//! memory through which a process on the same node asks) and [`door`] (what it says there).

pub mod convert;
pub mod door;
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
