//! Sockets: a Unix socket always, that of the local door beside it, a loopback address if configured, nothing else while there is no
//! encryption.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tender_proto::greeting::SOCKET_SUFFIX;
use tender_proto::wire;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::transport::server::Router;

use super::operator::OperatorServer;
use super::server::BlocksServer;
use crate::config::Config;
use crate::limits;

pub use super::operator::OperatorServer as Operators;

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody listens there.
    #[error(
        "a daemon already answers on socket {0}; stop it (`tender status` shows its process), or give this one another --socket"
    )]
    SocketTaken(String),
    /// The system said no.
    #[error("cannot listen on socket {path}: {source}; give a --socket in a folder that this user may write to")]
    Socket {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The system said no.
    #[error("cannot listen on {address}: {source}; give another --listen")]
    Address {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
}

/// The sockets, bound and not yet served.
pub struct Listeners {
    unix: UnixListener,
    tcp: Option<TcpListener>,
    file: SocketFile,
    door: std::os::unix::net::UnixListener,
    door_file: SocketFile,
}

/// The name of our Unix socket: removed with the daemon, whether it served or did not even start.
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), inode: std::fs::symlink_metadata(path)?.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another daemon may have taken the name over.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listeners {
    /// Binds all sockets of a configuration. A socket file that nobody answers on is left from a daemon that was killed.
    pub async fn bind(config: &Config) -> Result<Self, ListenError> {
        let path = &config.socket;
        let error = |source| ListenError::Socket { path: path.display().to_string(), source };
        if is_taken(path).await {
            return Err(ListenError::SocketTaken(path.display().to_string()));
        }
        remove_stale(path).map_err(error)?;
        if let Some(folder) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(error)?;
        }
        let unix = UnixListener::bind(path).map_err(error)?;
        let file = SocketFile::of(path).map_err(error)?;
        let mode = std::fs::Permissions::from_mode(config.socket_mode);
        std::fs::set_permissions(path, mode.clone()).map_err(error)?;
        let mut door_path = path.clone().into_os_string();
        door_path.push(SOCKET_SUFFIX);
        let door_path = PathBuf::from(door_path);
        let door_error = |source| ListenError::Socket { path: door_path.display().to_string(), source };
        remove_stale(&door_path).map_err(door_error)?;
        let door = std::os::unix::net::UnixListener::bind(&door_path).map_err(door_error)?;
        let door_file = SocketFile::of(&door_path).map_err(door_error)?;
        std::fs::set_permissions(&door_path, mode).map_err(door_error)?;
        let tcp = match config.listen {
            None => None,
            Some(address) => Some(
                TcpListener::bind(address)
                    .await
                    .map_err(|source| ListenError::Address { address: address.to_string(), source })?,
            ),
        };
        Ok(Self { unix, tcp, file, door, door_file })
    }

    /// The socket of the local door, for whoever serves it.
    pub fn door(&self) -> io::Result<std::os::unix::net::UnixListener> {
        self.door.try_clone()
    }

    /// Serves until `stop` is resolved, then lets what is under way finish.
    pub async fn serve(
        self,
        blocks: BlocksServer,
        operators: OperatorServer,
        stop: tokio::sync::watch::Receiver<bool>,
    ) -> Result<(), tonic::transport::Error> {
        let stopped = |mut stop: tokio::sync::watch::Receiver<bool>| async move {
            // A sender that is gone says the same.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let Self { unix, tcp, file: _until_the_end, door: _, door_file: _and_this } = self;
        let unix = router(blocks.clone(), operators.clone())
            .serve_with_incoming_shutdown(UnixListenerStream::new(unix), stopped(stop.clone()));
        let tcp = async {
            let Some(listener) = tcp else { return Ok(()) };
            router(blocks, operators)
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped(stop))
                .await
        };
        tokio::try_join!(unix, tcp).map(|_| ())
    }
}

/// Whether somebody answers and goes on to: a process that was killed holds its socket until the kernel has taken back its memory.
async fn is_taken(path: &Path) -> bool {
    const PATIENCE: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(50);
    let answers = || std::os::unix::net::UnixStream::connect(path).is_ok();
    let gone = async {
        while answers() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.is_err()
}

fn remove_stale(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is in its place")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn router(blocks: BlocksServer, operators: OperatorServer) -> Router {
    /// Windows of a stream and of a connection: a get of 16 MiB is under way while the next is leased.
    const STREAM_WINDOW: u32 = 8 << 20;
    const CONNECTION_WINDOW: u32 = 16 << 20;
    /// Streams of one connection: a client may hold that many leases windows at once.
    const STREAMS_MAX: u32 = 256;
    let blocks = wire::blocks_server::BlocksServer::new(blocks)
        .max_decoding_message_size(limits::REQUEST_BYTES_MAX)
        .max_encoding_message_size(limits::REQUEST_BYTES_MAX);
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(STREAMS_MAX)
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(blocks)
        .add_service(wire::operator_server::OperatorServer::new(operators))
}
