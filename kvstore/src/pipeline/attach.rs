//! Who may ask: namespaces are checked here, once, so that two processes which would derive different keys find out at once.

use tender_proto::{BlockLayout, Namespace, ReuseRule};

use super::{Action, Actions, Core, TenantConfig};
use crate::admission::attachments::AttachError;
use crate::limits;
use crate::names::{AttachmentId, Door, Holder, NamespaceId, TenantId};
use crate::tier;
use crate::tier::disk::format;
use crate::verb::{AttachVerb, Attached, RefusalKind, Reply};

/// What a request's attachment says of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Under {
    /// The namespace of its keys.
    pub namespace: NamespaceId,
    /// Who holds what it reserves and leases.
    pub holder: Holder,
    /// The bytes of its blocks.
    pub layout: BlockLayout,
    /// Seeds their sums.
    pub fingerprint: u64,
}

impl Core {
    pub(super) fn attach(&mut self, tenant: TenantId, attach: AttachVerb, actions: &mut Actions) -> Reply {
        let AttachVerb { attachment, group, member, namespace, layout, expected_root } = attach;
        if layout.reuse_rule != ReuseRule::Prefix {
            let message = format!(
                "layout.reuse_rule is {:?}, but this daemon serves prefix only; attach the groups of full attention alone",
                layout.reuse_rule
            );
            return Reply::refused(RefusalKind::Invalid, message);
        }
        if namespace.public && !self.config.allow_public {
            let message = "namespace.public is true, but this daemon allows no public namespaces; set `allow_public = true` \
                           in its configuration, or attach without it";
            return Reply::refused(RefusalKind::Forbidden, message);
        }
        let slot_bytes = u64::from(tier::slot_bytes(layout.block_bytes()));
        let segment_bytes = self.config.host_segment_bytes;
        if slot_bytes > segment_bytes {
            let message = format!(
                "a block of this layout has {} bytes, but a segment of host memory only {segment_bytes}; give the daemon more \
                 memory with --host",
                layout.block_bytes()
            );
            return Reply::refused(RefusalKind::Contradiction, message);
        }
        let tenant_config = &self.config.tenants[tenant.0 as usize];
        let (salt, name, host_quota_bytes) =
            (tenant_config.salt, tenant_config.name.clone(), tenant_config.host_quota_bytes);
        let root = namespace.root(&salt);
        if let Some(theirs) = expected_root.filter(|theirs| *theirs != root) {
            let message = format!(
                "expected_root is {theirs}, but this daemon derives {root} from the same namespace: the salt or the versions \
                 differ; use the salt of this attach's answer and the derivation of protocol version {}",
                tender_proto::PROTOCOL_VERSION
            );
            return Reply::refused(RefusalKind::Contradiction, message);
        }
        if let Err(error) = self.attachments.may_join(tenant, &group, &namespace) {
            let kind = match error {
                AttachError::Full(_) => RefusalKind::Busy,
                AttachError::GroupDisagrees { .. } => RefusalKind::Contradiction,
            };
            return Reply::refused(kind, error.to_string());
        }
        let (id, is_first) = match self
            .index
            .namespaces
            .attach(tenant, namespace.clone(), layout, root, |id| self.attachments.is_attached(id))
        {
            Ok(attached) => attached,
            Err(error) => return Reply::refused(RefusalKind::Contradiction, error.to_string()),
        };
        if is_first {
            actions.extend(self.misfits(tenant, &namespace, &layout).map(Action::Warn));
        }
        self.attachments.join(attachment, tenant, group, member, id, namespace, self.now_ms);
        Reply::Attached(Box::new(Attached {
            attachment,
            root,
            salt: *salt.as_bytes(),
            tenant: name,
            block_bytes: layout.block_bytes(),
            host_quota_bytes,
        }))
    }

    /// The process of an attachment comes to the local door, and has what it had under its former attachment. Whoever knows its number is
    /// that process.
    pub(super) fn join(&mut self, attachment: AttachmentId, former: Option<AttachmentId>) -> Reply {
        let Some(attached) = self.attachments.peek(attachment) else { return Self::unattached(attachment) };
        let (tenant, group, namespace) = (attached.tenant, attached.group, attached.namespace);
        // It would have to read in place what belongs to other tenants, and with it their other blocks.
        if self.index.namespaces.get(namespace).known.as_ref().is_some_and(|known| known.namespace.public) {
            let message =
                "blocks of a public namespace are served over gRPC alone: they may lie among another tenant's";
            return Reply::refused(RefusalKind::Contradiction, message);
        }
        let most = (limits::LOCALS_MAX / self.config.tenants.len()).max(1);
        let formers = former.map(|former| self.attachments.formers(attachment, former)).unwrap_or_default();
        if self.attachments.local_processes(tenant) - formers.len() >= most {
            let message =
                format!("this tenant has {most} processes at the local door, and no more fit; use gRPC meanwhile");
            return Reply::refused(RefusalKind::Busy, message);
        }
        if !self.attachments.make_local(attachment, former) {
            let message = "this attachment has come to the local door already; attach once for each process";
            return Reply::refused(RefusalKind::Contradiction, message);
        }
        if !self.record_member(attachment) {
            self.attachments.leave(attachment, tenant);
            let message = "the records of local processes are full; end some, or use gRPC meanwhile";
            return Reply::refused(RefusalKind::Busy, message);
        }
        for former in formers {
            self.take_over(former, attachment);
        }
        Reply::Joined { tenant, group }
    }

    /// What keeps whole blocks of this layout from disk or from memory though nothing refuses them: each with its cure.
    fn misfits(&self, tenant: TenantId, namespace: &Namespace, layout: &BlockLayout) -> impl Iterator<Item = String> {
        let slot_bytes = u64::from(tier::slot_bytes(layout.block_bytes()));
        let over = |bytes_max: Option<u64>| bytes_max.filter(|&bytes_max| slot_bytes > bytes_max);
        let TenantConfig { name, host_quota_bytes, disk_quota_bytes, .. } = &self.config.tenants[tenant.0 as usize];
        let memory = over(*host_quota_bytes).map(|quota_bytes| {
            format!(
                "the tenant's host_quota is {quota_bytes}: no block put whole is stored, and each is answered \"over quota\"; raise \
                 the quota"
            )
        });
        let disk = self.config.disk.as_ref().and_then(|disk| {
            let segment_bytes = disk.segment_bytes;
            if format::slots_per_segment(segment_bytes, slot_bytes) == 0 {
                return Some(format!(
                    "a segment of disk has {segment_bytes}, its directory included: a block put whole stays in host memory and \
                     never reaches disk; give a larger --disk, which has larger segments, or set disk_segment"
                ));
            }
            if let Some(quota_bytes) = over(*disk_quota_bytes) {
                return Some(format!(
                    "the tenant's disk_quota is {quota_bytes}: its blocks stay in host memory and never reach disk; raise the quota"
                ));
            }
            over(self.worth.block_bytes_max()).map(|saved_bytes| {
                format!(
                    "write_budget_per_day lets {saved_bytes} be saved up at most: only blocks that a client asks to be durable reach \
                     disk; raise the budget"
                )
            })
        });
        let blocks = format!(
            "blocks of model {:?} (tenant `{name}`) have {} bytes, but ",
            namespace.model,
            layout.block_bytes()
        );
        [memory, disk].into_iter().flatten().map(move |misfit| format!("{blocks}{misfit}"))
    }

    /// What an attachment stands for.
    pub(super) fn under(&mut self, tenant: TenantId, attachment: AttachmentId) -> Option<Under> {
        let attached = self.attachments.get(attachment, tenant, self.now_ms)?;
        let (namespace, holder) =
            (attached.namespace, Holder { group: attached.group, attachment, door: Door::Stream });
        let known = self.index.namespaces.get(namespace).known.as_ref();
        let known = known.expect("an attachment's namespace is known");
        Some(Under { namespace, holder, layout: known.layout, fingerprint: known.fingerprint })
    }
}
