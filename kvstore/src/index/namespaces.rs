//! Namespaces that were attached to, or that a recovered directory mentions: the roots of all chains.

use std::collections::HashMap;

use tender_proto::{BlockKey, BlockLayout, Namespace};

use crate::limits;
use crate::names::{NamespaceId, TenantId};

/// A namespace of one tenant.
#[derive(Clone, Debug)]
pub struct NamespaceRecord {
    /// Whose; for a public one the first tenant that attached.
    pub tenant: TenantId,
    /// First half of the root.
    pub tag: [u8; 16],
    /// What it is, once somebody attached to it; a directory knows only the tag.
    pub known: Option<Known>,
    /// Fingerprint of the layout of blocks found at start.
    pub found_layout: Option<u64>,
    /// Blocks with a copy in any tier.
    pub blocks: u64,
}

/// What an attach tells of a namespace.
#[derive(Clone, Debug)]
pub struct Known {
    /// The namespace.
    pub namespace: Namespace,
    /// Parent of every first block.
    pub root: BlockKey,
    /// The bytes of its blocks.
    pub layout: BlockLayout,
    /// `layout.fingerprint()`, which seeds every sum.
    pub fingerprint: u64,
}

/// All namespaces.
#[derive(Debug)]
pub struct Namespaces {
    /// Namespaces of one tenant.
    tenant_max: usize,
    records: Vec<NamespaceRecord>,
    by_tag: HashMap<(Option<TenantId>, [u8; 16]), NamespaceId>,
}

/// Why a namespace cannot be attached to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    /// Others hold blocks of another shape under the same name.
    #[error(
        "layout disagrees: others attached to this namespace (model `{model}`) with blocks of {theirs} bytes ({their_layout}), but the \
         attach says {ours} bytes ({our_layout}); attach with that layout, or put what differs into namespace.revision"
    )]
    LayoutDiffers {
        /// Name of the model.
        model: String,
        /// Bytes of a block as attached before.
        theirs: u64,
        /// Layout as attached before.
        their_layout: String,
        /// Bytes of a block as asked for.
        ours: u64,
        /// Layout as asked for.
        our_layout: String,
    },
    /// What was found at the start has another layout.
    #[error(
        "layout disagrees: found at the start were {blocks} blocks of this namespace (model `{model}`) in another layout than this one (blocks of \
         {ours} bytes); attach with theirs, or put what differs into namespace.revision"
    )]
    FoundLayoutDiffers {
        /// Name of the model.
        model: String,
        /// Blocks found.
        blocks: u64,
        /// Bytes of a block as asked for.
        ours: u64,
    },
    /// The table is full.
    #[error(
        "this tenant has attached to {0} namespaces since the start, and no more fit until the daemon is restarted"
    )]
    Full(usize),
}

impl Namespaces {
    /// None yet; each of the tenants may have its part of them.
    pub fn new(tenant_count: usize) -> Self {
        let tenant_max = limits::NAMESPACES_MAX / tenant_count.max(1);
        Self { tenant_max, records: Vec::new(), by_tag: HashMap::new() }
    }

    /// The namespace's record.
    pub fn get(&self, namespace: NamespaceId) -> &NamespaceRecord {
        &self.records[namespace.0 as usize]
    }

    /// The namespace's record, to be changed.
    pub fn get_mut(&mut self, namespace: NamespaceId) -> &mut NamespaceRecord {
        &mut self.records[namespace.0 as usize]
    }

    /// All namespaces.
    pub fn all(&self) -> impl Iterator<Item = &NamespaceRecord> {
        self.records.iter()
    }

    /// Attaches to a namespace, which exists afterwards; tells whether nobody did so before, or not in this shape. A layout stands as long
    /// as the namespace has blocks, or anybody `is_attached`.
    pub fn attach(
        &mut self,
        tenant: TenantId,
        namespace: Namespace,
        layout: BlockLayout,
        root: BlockKey,
        is_attached: impl Fn(NamespaceId) -> bool,
    ) -> Result<(NamespaceId, bool), NamespaceError> {
        let owner = (!namespace.public).then_some(tenant);
        let id = self.find_or_add(owner, tenant, root.tag())?;
        let record = self.get_mut(id);
        let found = record.found_layout;
        let differs = found != Some(layout.fingerprint());
        // Somebody from before a restart may still fill blocks of it.
        let is_held = found.is_some() && is_attached(id);
        match &record.known {
            Some(known) if known.layout != layout && (record.blocks > 0 || is_attached(id)) => {
                Err(NamespaceError::LayoutDiffers {
                    model: namespace.model,
                    theirs: known.layout.block_bytes(),
                    their_layout: format!("{:?}", known.layout.form),
                    ours: layout.block_bytes(),
                    our_layout: format!("{:?}", layout.form),
                })
            }
            Some(known) if known.layout == layout => Ok((id, false)),
            None if differs && (record.blocks > 0 || is_held) => Err(NamespaceError::FoundLayoutDiffers {
                model: namespace.model,
                blocks: record.blocks,
                ours: layout.block_bytes(),
            }),
            // Nobody has a block of it, or is attached to it, in the shape that was agreed on before.
            _ => {
                record.known = Some(Known { namespace, root, layout, fingerprint: layout.fingerprint() });
                Ok((id, true))
            }
        }
    }

    /// The namespace that a directory entry mentions.
    pub fn recovered(
        &mut self,
        tenant: TenantId,
        public: bool,
        tag: [u8; 16],
        layout: u64,
    ) -> Result<NamespaceId, NamespaceError> {
        let id = self.find_or_add((!public).then_some(tenant), tenant, tag)?;
        self.get_mut(id).found_layout = Some(layout);
        Ok(id)
    }

    fn find_or_add(
        &mut self,
        owner: Option<TenantId>,
        tenant: TenantId,
        tag: [u8; 16],
    ) -> Result<NamespaceId, NamespaceError> {
        if let Some(&id) = self.by_tag.get(&(owner, tag)) {
            return Ok(id);
        }
        let own = self.records.iter().filter(|record| record.tenant == tenant).count();
        if own >= self.tenant_max {
            return Err(NamespaceError::Full(own));
        }
        let id = NamespaceId(self.records.len() as u32);
        self.records.push(NamespaceRecord { tenant, tag, known: None, found_layout: None, blocks: 0 });
        self.by_tag.insert((owner, tag), id);
        Ok(id)
    }
}
