//! Sockets: a Unix socket always, that of the local door beside it, a loopback address if configured, nothing else while there is no
//! encryption.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tender_proto::greeting;
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

/// The sockets, bound, with their names in the file system. Held by the keeper, so that nobody who asks is turned away while one worker
/// follows another.
pub struct Bound {
    unix: std::os::unix::net::UnixListener,
    door: std::os::unix::net::UnixListener,
    tcp: Option<std::net::TcpListener>,
    _names: [SocketFile; 2],
}

/// The sockets as a worker serves them.
pub struct Listeners {
    unix: UnixListener,
    tcp: Option<TcpListener>,
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

impl Bound {
    /// Binds all sockets of a configuration. A socket file that nobody answers on is left from a daemon that was killed.
    pub fn bind(config: &Config) -> Result<Self, ListenError> {
        let path = &config.socket;
        let error = |source| ListenError::Socket { path: path.display().to_string(), source };
        if is_taken(path) {
            return Err(ListenError::SocketTaken(path.display().to_string()));
        }
        if let Some(folder) = path.parent() {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(error)?;
        }
        let (unix, unix_name) = bind_unix(path, config.socket_mode).map_err(error)?;
        let door_path = greeting::door_path(path);
        let door_error = |source| ListenError::Socket { path: door_path.display().to_string(), source };
        let (door, door_name) = bind_unix(&door_path, config.socket_mode).map_err(door_error)?;
        let tcp = config.listen.map(|address| {
            let error = |source| ListenError::Address { address: address.to_string(), source };
            std::net::TcpListener::bind(address).map_err(error)
        });
        Ok(Self { unix, door, tcp: tcp.transpose()?, _names: [unix_name, door_name] })
    }

    /// For a worker: gRPC on the Unix socket, the local door, gRPC on a loopback address if there is one.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let tcp = self.tcp.as_ref().map(AsFd::as_fd);
        [self.unix.as_fd(), self.door.as_fd()].into_iter().chain(tcp).collect()
    }
}

fn bind_unix(path: &Path, mode: u32) -> io::Result<(std::os::unix::net::UnixListener, SocketFile)> {
    remove_stale(path)?;
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    let name = SocketFile::of(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok((listener, name))
}

impl Listeners {
    /// Takes over sockets that are bound. Within a runtime.
    pub fn new(unix: std::os::unix::net::UnixListener, tcp: Option<std::net::TcpListener>) -> io::Result<Self> {
        unix.set_nonblocking(true)?;
        let tcp = tcp.map(|tcp| {
            tcp.set_nonblocking(true)?;
            TcpListener::from_std(tcp)
        });
        Ok(Self { unix: UnixListener::from_std(unix)?, tcp: tcp.transpose()? })
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
        let Self { unix, tcp } = self;
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
fn is_taken(path: &Path) -> bool {
    const PATIENCE: Duration = Duration::from_secs(2);
    const PAUSE: Duration = Duration::from_millis(50);
    let since = Instant::now();
    while std::os::unix::net::UnixStream::connect(path).is_ok() {
        if since.elapsed() >= PATIENCE {
            return true;
        }
        std::thread::sleep(PAUSE);
    }
    false
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
