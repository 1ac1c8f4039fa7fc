//! Who is attached: processes, in groups, each under one namespace.

use std::collections::{BTreeMap, HashMap};

use tender_proto::Namespace;

use crate::limits;
use crate::names::{AttachmentId, GroupId, NamespaceId, TenantId};

/// One process under one namespace.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Whose.
    pub tenant: TenantId,
    /// Its keys' namespace.
    pub namespace: NamespaceId,
    /// Its group: reservations and leases belong to it.
    pub group: GroupId,
    /// Name of the process, for people.
    pub member: String,
    /// It writes and reads in place, and its process is watched.
    is_local: bool,
    used_ms: u64,
}

#[derive(Debug)]
struct Group {
    id: GroupId,
    members: usize,
    /// What its first member said of the model: the others must agree.
    namespace: Namespace,
}

/// All attachments.
#[derive(Debug, Default)]
pub struct Attachments {
    attachments: HashMap<AttachmentId, (Attachment, String)>,
    groups: HashMap<(TenantId, String), Group>,
    /// Processes that write and read in place, by group.
    local: BTreeMap<(TenantId, GroupId), usize>,
    last_group: u32,
    tenant_count: usize,
}

/// Why an attach is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Members of one engine instance say different things.
    #[error(
        "namespace.{field} disagrees within group `{group}`: this member says `{ours}`, the others `{theirs}`; they would derive \
         different keys. Give all members the same, or this one another group"
    )]
    GroupDisagrees {
        /// Name of the group.
        group: String,
        /// Name on the wire.
        field: &'static str,
        /// What came.
        ours: String,
        /// What the first member said.
        theirs: String,
    },
    /// The table is full.
    #[error(
        "this tenant has {0} attachments, and no more fit; detach what is not needed, or wait until the idle ones expire"
    )]
    Full(usize),
}

impl Attachments {
    /// None yet; each of the tenants may have its part of them.
    pub fn new(tenant_count: usize) -> Self {
        Self { tenant_count, ..Self::default() }
    }

    /// Whether a process may join that group under that namespace.
    pub fn may_join(&self, tenant: TenantId, group: &str, namespace: &Namespace) -> Result<(), AttachError> {
        let own = self.attachments.values().filter(|(attachment, _)| attachment.tenant == tenant).count();
        if own >= limits::ATTACHMENTS_MAX / self.tenant_count.max(1) {
            return Err(AttachError::Full(own));
        }
        let Some(known) = self.groups.get(&(tenant, group.to_owned())) else { return Ok(()) };
        let theirs = &known.namespace;
        let fields = [
            ("model", namespace.model.clone(), theirs.model.clone()),
            ("revision", namespace.revision.clone(), theirs.revision.clone()),
            ("kv_dtype", namespace.kv_dtype.clone(), theirs.kv_dtype.clone()),
            ("block_tokens", namespace.block_tokens.to_string(), theirs.block_tokens.to_string()),
        ];
        match fields.into_iter().find(|(_, ours, theirs)| ours != theirs) {
            Some((field, ours, theirs)) => {
                Err(AttachError::GroupDisagrees { group: group.to_owned(), field, ours, theirs })
            }
            None => Ok(()),
        }
    }

    /// Adds a process that may join.
    #[expect(clippy::too_many_arguments, reason = "each is a different thing, and there is one caller")]
    pub fn join(
        &mut self,
        id: AttachmentId,
        tenant: TenantId,
        group: String,
        member: String,
        namespace: NamespaceId,
        spoken: Namespace,
        now_ms: u64,
    ) {
        let last = &mut self.last_group;
        let entry = self.groups.entry((tenant, group.clone())).or_insert_with(|| {
            *last += 1;
            Group { id: GroupId(*last), members: 0, namespace: spoken }
        });
        entry.members += 1;
        let attachment = Attachment { tenant, namespace, group: entry.id, member, is_local: false, used_ms: now_ms };
        self.attachments.insert(id, (attachment, group));
    }

    /// The attachment of that name, if it is the tenant's; it counts as used.
    pub fn get(&mut self, id: AttachmentId, tenant: TenantId, now_ms: u64) -> Option<&Attachment> {
        let (attachment, _) = self.attachments.get_mut(&id)?;
        attachment.used_ms = now_ms;
        (attachment.tenant == tenant).then_some(attachment)
    }

    /// Whether anybody is attached to a namespace.
    pub fn is_attached(&self, namespace: NamespaceId) -> bool {
        self.attachments.values().any(|(attachment, _)| attachment.namespace == namespace)
    }

    /// Whether there is one of that name.
    pub fn has(&self, id: AttachmentId) -> bool {
        self.attachments.contains_key(&id)
    }

    /// The attachment of that name, whoever asks.
    pub fn peek(&self, id: AttachmentId) -> Option<&Attachment> {
        self.attachments.get(&id).map(|(attachment, _)| attachment)
    }

    /// An attachment is of a process that writes and reads in place, which it was not before.
    pub fn make_local(&mut self, id: AttachmentId) -> bool {
        let Some((attachment, _)) = self.attachments.get_mut(&id).filter(|(attachment, _)| !attachment.is_local) else {
            return false;
        };
        attachment.is_local = true;
        *self.local.entry((attachment.tenant, attachment.group)).or_default() += 1;
        true
    }

    /// Whether it writes and reads in place.
    pub fn is_local(&self, id: AttachmentId) -> bool {
        self.peek(id).is_some_and(|attachment| attachment.is_local)
    }

    /// Such a process is gone: its group, and whether no other of the group is left.
    pub fn local_gone(&mut self, id: AttachmentId) -> Option<(GroupId, bool)> {
        let (attachment, _) = self.attachments.get(&id).filter(|(attachment, _)| attachment.is_local)?;
        let (tenant, group) = (attachment.tenant, attachment.group);
        self.remove(id);
        Some((group, !self.local.contains_key(&(tenant, group))))
    }

    /// How many write and read in place.
    pub fn local_count(&self) -> usize {
        self.local.values().sum()
    }

    /// Such processes of a tenant.
    pub fn local_processes(&self, tenant: TenantId) -> usize {
        self.local.range((tenant, GroupId(0))..=(tenant, GroupId(u32::MAX))).map(|(_, count)| count).sum()
    }

    /// Groups of a tenant with such a process.
    pub fn local_groups(&self, tenant: TenantId) -> usize {
        self.local.range((tenant, GroupId(0))..=(tenant, GroupId(u32::MAX))).count()
    }

    /// Ends an attachment of that tenant.
    pub fn leave(&mut self, id: AttachmentId, tenant: TenantId) {
        if self.attachments.get(&id).is_some_and(|(attachment, _)| attachment.tenant == tenant) {
            self.remove(id);
        }
    }

    /// Ends attachments that nobody has used for long.
    pub fn expire(&mut self, now_ms: u64) {
        let idle_ms = limits::ATTACHMENT_IDLE.as_millis() as u64;
        let is_idle = |attachment: &Attachment| !attachment.is_local && attachment.used_ms + idle_ms < now_ms;
        let idle = self.attachments.iter().filter(|(_, (attachment, _))| is_idle(attachment));
        for id in idle.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    fn remove(&mut self, id: AttachmentId) {
        let Some((attachment, group)) = self.attachments.remove(&id) else { return };
        let local = (attachment.tenant, attachment.group);
        if attachment.is_local
            && let Some(members) = self.local.get_mut(&local)
        {
            *members -= 1;
            if *members == 0 {
                self.local.remove(&local);
            }
        }
        let name = (attachment.tenant, group);
        if let Some(group) = self.groups.get_mut(&name) {
            group.members -= 1;
            if group.members == 0 {
                self.groups.remove(&name);
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.attachments.len()
    }
}
