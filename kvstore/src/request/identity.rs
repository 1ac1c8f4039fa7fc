//! Who asks: the tenant of the token, or else of the socket. Not the uid, since in a cluster everybody may be uid 0.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use crate::config::Tenant;
use crate::names::TenantId;

/// Shortest token: what is shorter can be guessed.
const TOKEN_BYTES_MIN: usize = 16;

/// Tokens of all tenants, as hashes: comparing them tells nothing of the tokens.
pub struct Identities {
    by_token: HashMap<[u8; 32], TenantId>,
    /// Who comes over the Unix socket without a token.
    tokenless: Option<TenantId>,
}

/// A token file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("cannot read token file {path} of tenant `{tenant}`: {source}; write the token there, one line, mode 0600")]
    Read {
        /// Which.
        path: String,
        /// Whose.
        tenant: String,
        /// Why.
        source: io::Error,
    },
    /// Others could read it.
    #[error("token file {path} of tenant `{tenant}` has mode {mode:04o}: others can read it; chmod 600 {path}")]
    Mode {
        /// Which.
        path: String,
        /// Whose.
        tenant: String,
        /// Its mode.
        mode: u32,
    },
    /// It can be guessed, or is somebody else's.
    #[error("the token in {path} of tenant `{tenant}` {what}")]
    Content {
        /// Which.
        path: String,
        /// Whose.
        tenant: String,
        /// What is wrong, and the cure.
        what: String,
    },
}

/// What a connection may see of the operator's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Everything.
    Operator,
    /// A tenant's own rows.
    Tenant(TenantId),
}

fn read_token(tenant: &Tenant, path: &Path) -> Result<String, TokenError> {
    let (name, tenant) = (path.display().to_string(), tenant.name.clone());
    let read = || -> io::Result<(u32, String)> {
        Ok((std::fs::metadata(path)?.permissions().mode() & 0o777, std::fs::read_to_string(path)?))
    };
    let (mode, text) = match read() {
        Ok(read) => read,
        Err(source) => return Err(TokenError::Read { path: name, tenant, source }),
    };
    if mode & 0o077 != 0 {
        return Err(TokenError::Mode { path: name, tenant, mode });
    }
    let token = text.trim();
    let is_visible = token.bytes().all(|byte| byte.is_ascii_graphic());
    if token.len() < TOKEN_BYTES_MIN || !is_visible {
        let what = format!(
            "must have at least {TOKEN_BYTES_MIN} visible ASCII characters; make one with `openssl rand -hex 32`"
        );
        return Err(TokenError::Content { path: name, tenant, what });
    }
    Ok(token.to_owned())
}

impl Identities {
    /// Reads the tenants' tokens.
    pub fn load(tenants: &[Tenant]) -> Result<Self, TokenError> {
        let mut identities = Self { by_token: HashMap::new(), tokenless: None };
        for (tenant, id) in tenants.iter().zip(0u16..) {
            let Some(path) = &tenant.token_file else {
                identities.tokenless = Some(TenantId(id));
                continue;
            };
            let token = read_token(tenant, path)?;
            if identities.by_token.insert(*blake3::hash(token.as_bytes()).as_bytes(), TenantId(id)).is_some() {
                let (path, tenant) = (path.display().to_string(), tenant.name.clone());
                let what = "is another tenant's too; give each its own".to_owned();
                return Err(TokenError::Content { path, tenant, what });
            }
        }
        Ok(identities)
    }

    /// The tenant behind a request.
    pub fn tenant<T>(&self, request: &Request<T>) -> Result<TenantId, Status> {
        let local = request.extensions().get::<UdsConnectInfo>().is_some();
        match request.metadata().get("authorization") {
            Some(value) => {
                let token = value.to_str().ok().and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
                let tenant = self.by_token.get(blake3::hash(token.trim().as_bytes()).as_bytes());
                tenant.copied().ok_or_else(|| {
                    Status::unauthenticated(
                        "the token in metadata `authorization` is no tenant's; check the token file",
                    )
                })
            }
            None if local => self.tokenless.ok_or_else(|| {
                Status::unauthenticated("every tenant of this daemon has a token; send `authorization: Bearer <token>`")
            }),
            None => Err(Status::unauthenticated("over TCP a token is needed; send `authorization: Bearer <token>`")),
        }
    }

    /// What a request may see: everything, if it comes over the Unix socket from the daemon's own user or root.
    pub fn rights<T>(&self, request: &Request<T>) -> Result<Rights, Status> {
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        let own = rustix::process::geteuid().as_raw();
        match peer {
            Some(peer) if peer.uid() == 0 || peer.uid() == own => Ok(Rights::Operator),
            _ => self.tenant(request).map(Rights::Tenant),
        }
    }
}
