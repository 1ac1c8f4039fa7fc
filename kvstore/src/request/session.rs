//! What an attachment said of its namespace and layout: needed to check a request before it goes to the core.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tender_proto::{BlockKey, BlockLayout};

use crate::limits;
use crate::names::{AttachmentId, TenantId};

/// One attachment.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub attachment: AttachmentId,
    pub tenant: TenantId,
    pub root: BlockKey,
    pub block_tokens: u32,
    pub layout: BlockLayout,
    pub fingerprint: u64,
}

/// All attachments.
#[derive(Default)]
pub(super) struct Sessions {
    sessions: Mutex<HashMap<AttachmentId, Arc<Session>>>,
}

impl Sessions {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<AttachmentId, Arc<Session>>> {
        // A map is whole between any two of its calls.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The core forgets the idle on its own; when many are left over here, all are asked to attach again.
    pub fn add(&self, session: Session) {
        let mut sessions = self.lock();
        if sessions.len() >= 2 * limits::ATTACHMENTS_MAX {
            sessions.clear();
        }
        sessions.insert(session.attachment, Arc::new(session));
    }

    pub fn remove(&self, attachment: AttachmentId) {
        self.lock().remove(&attachment);
    }

    /// The session of that name, if it is this tenant's.
    pub fn get(&self, attachment: u64, tenant: TenantId) -> Option<Arc<Session>> {
        let session = self.lock().get(&AttachmentId(attachment)).cloned();
        session.filter(|session| session.tenant == tenant)
    }
}
