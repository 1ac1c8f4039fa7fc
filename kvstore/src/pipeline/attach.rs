//! Who may ask: namespaces are checked here, once, so that two processes which would derive different keys find out at once.

use tender_proto::{BlockLayout, ReuseRule};

use super::Core;
use crate::admission::attachments::AttachError;
use crate::index::ids::{GroupId, NamespaceId, TenantId};
use crate::request::verb::{AttachVerb, Attached, AttachmentId, RefusalKind, Reply};
use crate::tier;

/// What a request's attachment says of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Under {
    /// The namespace of its keys.
    pub namespace: NamespaceId,
    /// Who holds what it reserves.
    pub group: GroupId,
    /// The bytes of its blocks.
    pub layout: BlockLayout,
    /// Seeds their sums.
    pub fingerprint: u64,
}

impl Core {
    pub(super) fn attach(&mut self, tenant: TenantId, attach: AttachVerb) -> Reply {
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
        let (salt, name) = (tenant_config.salt, tenant_config.name.clone());
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
        let id = match self.index.namespaces.attach(tenant, namespace.clone(), layout, root) {
            Ok(id) => id,
            Err(error) => return Reply::refused(RefusalKind::Contradiction, error.to_string()),
        };
        self.attachments.join(attachment, tenant, group, member, id, namespace, self.now_ms);
        Reply::Attached(Box::new(Attached {
            attachment,
            root,
            salt: *salt.as_bytes(),
            tenant: name,
            block_bytes: layout.block_bytes(),
        }))
    }

    /// What an attachment stands for.
    pub(super) fn under(&mut self, tenant: TenantId, attachment: AttachmentId) -> Option<Under> {
        let attached = self.attachments.get(attachment, tenant, self.now_ms)?;
        let (namespace, group) = (attached.namespace, attached.group);
        let known = self.index.namespaces.get(namespace).known.as_ref();
        let known = known.expect("an attachment's namespace is known");
        Some(Under { namespace, group, layout: known.layout, fingerprint: known.fingerprint })
    }
}
