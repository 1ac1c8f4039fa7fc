//! What may be asked.
pub mod status;
pub mod verb;
