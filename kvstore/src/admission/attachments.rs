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
    /// It was made before a restart: its process may still use what it held, and asks nothing under this name.
    is_former: bool,
    /// The one from before a restart whose place it took.
    pub former: Option<AttachmentId>,
    used_ms: u64,
}

/// How a group is named in records: BLAKE3 of its name, first half.
pub type GroupTag = [u8; 16];

/// The tag of a group's name.
pub fn group_tag(name: &str) -> GroupTag {
    let mut tag = [0; 16];
    tag.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..16]);
    tag
}

#[derive(Debug)]
struct Group {
    id: GroupId,
    members: usize,
    /// What its first member said of the model: the others must agree. None while all are from before a restart.
    namespace: Option<Namespace>,
}

/// All attachments.
#[derive(Debug, Default)]
pub struct Attachments {
    attachments: HashMap<AttachmentId, (Attachment, GroupTag)>,
    groups: HashMap<(TenantId, GroupTag), Group>,
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
        let is_own = |attachment: &Attachment| attachment.tenant == tenant && !attachment.is_former;
        let own = self.attachments.values().filter(|(attachment, _)| is_own(attachment)).count();
        if own >= limits::ATTACHMENTS_MAX / self.tenant_count.max(1) {
            return Err(AttachError::Full(own));
        }
        let known = self.groups.get(&(tenant, group_tag(group)));
        let Some(theirs) = known.and_then(|known| known.namespace.as_ref()) else { return Ok(()) };
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
        let (last, group) = (&mut self.last_group, group_tag(&group));
        let entry = self.groups.entry((tenant, group)).or_insert_with(|| {
            *last += 1;
            Group { id: GroupId(*last), members: 0, namespace: None }
        });
        entry.members += 1;
        entry.namespace.get_or_insert(spoken);
        let group_id = entry.id;
        let (is_local, is_former, former) = (false, false, None);
        let attachment =
            Attachment { tenant, namespace, group: group_id, member, is_local, is_former, former, used_ms: now_ms };
        self.attachments.insert(id, (attachment, group));
    }

    /// Adds a process that read and wrote in place before a restart.
    pub fn recover(
        &mut self,
        id: AttachmentId,
        tenant: TenantId,
        (group, tag): (GroupId, GroupTag),
        namespace: NamespaceId,
        former: Option<AttachmentId>,
    ) {
        let entry = self.groups.entry((tenant, tag)).or_insert(Group { id: group, members: 0, namespace: None });
        entry.members += 1;
        let (member, is_local, is_former) = (String::new(), true, true);
        let attachment = Attachment { tenant, namespace, group, member, is_local, is_former, former, used_ms: 0 };
        self.attachments.insert(id, (attachment, tag));
        *self.local.entry((tenant, group)).or_default() += 1;
    }

    /// Numbers of groups up to this one are in use already.
    pub fn groups_from(&mut self, group: GroupId) {
        self.last_group = self.last_group.max(group.0);
    }

    /// The attachments whose place another of the same group takes: the one that it names, and those that took its place before a restart
    /// and never heard so.
    pub fn formers(&self, id: AttachmentId, former: AttachmentId) -> Vec<AttachmentId> {
        let Some((new, tag)) = self.attachments.get(&id) else { return Vec::new() };
        let is_one = |other: &AttachmentId, attachment: &Attachment| {
            let is_named = *other == former || attachment.is_former && attachment.former == Some(former);
            *other != id
                && attachment.is_local
                && is_named
                && attachment.tenant == new.tenant
                && attachment.group == new.group
        };
        let found = self
            .attachments
            .iter()
            .filter(|(other, (attachment, other_tag))| is_one(other, attachment) && other_tag == tag);
        let mut found: Vec<AttachmentId> = found.map(|(other, _)| *other).collect();
        found.sort_unstable();
        found
    }

    /// What is recorded of an attachment: itself and the tag of its group.
    pub fn recorded(&self, id: AttachmentId) -> Option<(&Attachment, GroupTag)> {
        self.attachments.get(&id).map(|(attachment, tag)| (attachment, *tag))
    }

    /// The attachment of that name, if it is the tenant's; it counts as used.
    pub fn get(&mut self, id: AttachmentId, tenant: TenantId, now_ms: u64) -> Option<&Attachment> {
        let (attachment, _) = self.attachments.get_mut(&id)?;
        attachment.used_ms = now_ms;
        (attachment.tenant == tenant && !attachment.is_former).then_some(attachment)
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

    /// An attachment is of a process that writes and reads in place, which it was not before, and did so under a former one if it names
    /// that.
    pub fn make_local(&mut self, id: AttachmentId, former: Option<AttachmentId>) -> bool {
        let Some((attachment, _)) = self.attachments.get_mut(&id).filter(|(attachment, _)| !attachment.is_local) else {
            return false;
        };
        (attachment.is_local, attachment.former) = (true, former);
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

    /// Whether any process of a group writes and reads in place.
    pub fn is_local_group(&self, tenant: TenantId, group: GroupId) -> bool {
        self.local.contains_key(&(tenant, group))
    }

    /// Whether any process of that group writes and reads in place, whosever it is.
    pub fn has_local(&self, group: GroupId) -> bool {
        self.local.keys().any(|(_, local)| *local == group)
    }

    /// The group of an attachment.
    pub fn group(&self, id: AttachmentId) -> Option<GroupId> {
        self.attachments.get(&id).map(|(attachment, _)| attachment.group)
    }

    /// Tenants with a process that writes and reads in place.
    pub fn local_tenants(&self) -> usize {
        let mut tenants: Vec<TenantId> = self.local.keys().map(|(tenant, _)| *tenant).collect();
        tenants.dedup();
        tenants.len()
    }

    /// All processes that write and read in place, in the order of their numbers.
    pub fn local_processes_all(&self) -> Vec<AttachmentId> {
        let local = self.attachments.iter().filter(|(_, (attachment, _))| attachment.is_local);
        let mut local: Vec<AttachmentId> = local.map(|(id, _)| *id).collect();
        local.sort_unstable();
        local
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
