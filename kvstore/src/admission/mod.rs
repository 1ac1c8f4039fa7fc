//! May it run now? Who is attached, and whether a block is worth a write to disk. Quotas are counted where the slots are, in `tier`.

pub mod attachments;
pub mod grants;
pub mod worth;
