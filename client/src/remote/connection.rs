//! The way to a daemon: an address, a token, and one HTTP/2 connection over them.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};
use tower::service_fn;

use crate::{AttachError, deadline};

/// Flow control must not be the limit: at 3 GB/s and a scheduler that takes 2 ms to come back, 6 MB are on the way.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;

/// Two streams at full speed.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Frames as large as a chunk, so that a chunk is one.
const FRAME_BYTES_MAX: u32 = 1 << 20;

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A Unix socket: the daemon knows who is calling.
    Unix(PathBuf),
    /// A loopback address, with a token. Other addresses are refused: tokens would cross the network in clear text.
    Loopback(SocketAddr),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}

/// A target with what opens it.
#[derive(Clone)]
pub(crate) struct Door {
    target: Target,
    authorization: Option<MetadataValue<Ascii>>,
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Door({})", self.target)
    }
}

impl Door {
    /// The Unix socket, if it is one.
    pub(super) fn socket(&self) -> Option<&Path> {
        match &self.target {
            Target::Unix(path) => Some(path),
            Target::Loopback(_) => None,
        }
    }

    pub(crate) fn new(target: Target, token: Option<String>) -> Result<Self, AttachError> {
        if let Target::Loopback(address) = &target
            && !address.ip().is_loopback()
        {
            return Err(AttachError::Refused(format!(
                "{address} is not a loopback address, and without TLS a token would cross the network in clear text; \
                 use 127.0.0.1, [::1] or the daemon's Unix socket"
            )));
        }
        let authorization = token.map(|token| {
            let mut value = MetadataValue::try_from(format!("Bearer {token}")).map_err(|_| {
                AttachError::Refused(
                    "the token holds characters other than printable ASCII; look for a line end in its file".into(),
                )
            })?;
            value.set_sensitive(true);
            Ok(value)
        });
        Ok(Self { target, authorization: authorization.transpose()? })
    }

    /// One connection. When it breaks it stays broken: a channel that silently joined a restarted daemon would speak under an attachment
    /// that this daemon may have given to somebody else.
    pub(crate) async fn connect(&self) -> Result<Channel, AttachError> {
        // Only the authority's form matters here; the connector below goes to the target.
        let endpoint = Endpoint::from_static("http://tender.invalid")
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .http2_keep_alive_interval(deadline::PING)
            .keep_alive_timeout(deadline::PING);
        let connecting = async {
            match self.target.clone() {
                Target::Unix(path) => over(&endpoint, move || UnixStream::connect(path.clone())).await,
                Target::Loopback(address) => over(&endpoint, move || tcp(address)).await,
            }
        };
        self.within_connect(async { connecting.await.map_err(|error| self.unavailable(root_cause(&error))) }).await
    }

    /// A request that shows the token.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }

    /// Gives a first call as long as a connection, and says who did not answer it.
    pub(crate) async fn first_answer<T>(
        &self,
        answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, AttachError> {
        self.within_connect(async {
            match answer.await {
                Ok(answer) => Ok(answer.into_inner()),
                Err(status) => Err(self.refusal(&status)),
            }
        })
        .await
    }

    async fn within_connect<T>(&self, work: impl Future<Output = Result<T, AttachError>>) -> Result<T, AttachError> {
        match timeout(deadline::CONNECT, work).await {
            Ok(done) => done,
            Err(_) => Err(self.unavailable(format!("no answer in {} s", deadline::CONNECT.as_secs()))),
        }
    }

    fn refusal(&self, status: &Status) -> AttachError {
        match status.code() {
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded => {
                self.unavailable(format!("it closed the connection: {}", status.message()))
            }
            Code::Unimplemented => {
                AttachError::Refused(format!("{} is no Tender daemon, or another version of one", self.target))
            }
            Code::Unauthenticated => {
                let token_shown = self.authorization.is_some();
                AttachError::Unauthenticated { reason: status.message().to_owned(), token_shown }
            }
            _ => AttachError::Refused(status.message().to_owned()),
        }
    }

    fn unavailable(&self, reason: String) -> AttachError {
        AttachError::Unavailable { target: self.target.to_string(), reason }
    }
}

/// One HTTP/2 connection over whatever `open` opens, which it does once.
async fn over<S, F>(
    endpoint: &Endpoint,
    open: impl Fn() -> F + Send + Sync + 'static,
) -> Result<Channel, tonic::transport::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = io::Result<S>> + Send + 'static,
{
    let is_used = AtomicBool::new(false);
    let connector = service_fn(move |_: Uri| {
        let opening = (!is_used.swap(true, Ordering::Relaxed)).then(&open);
        async move {
            match opening {
                Some(opening) => opening.await.map(TokioIo::new),
                None => Err(io::ErrorKind::NotConnected.into()),
            }
        }
    });
    endpoint.connect_with_connector(connector).await
}

async fn tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The innermost reason: "Connection refused" says more than "transport error".
fn root_cause(error: &dyn Error) -> String {
    std::iter::successors(Some(error), |&error| error.source()).last().map(ToString::to_string).unwrap_or_default()
}
