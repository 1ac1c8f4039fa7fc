//! Every knob of the daemon: from a TOML file, then the environment, then flags, later ones winning; checked once, here.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tender_proto::greeting::SOCKET_SUFFIX;

use crate::limits;
use crate::size::Size;
use crate::tier::disk::format::SEGMENTS_OFFSET;

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Unix socket for gRPC.
    pub socket: PathBuf,
    /// Who may connect to it, as mode bits.
    pub socket_mode: u32,
    /// Loopback address for gRPC; everybody there needs a token.
    pub listen: Option<SocketAddr>,
    /// Folders of the tier files, one file in each.
    pub dirs: Vec<PathBuf>,
    /// Host memory.
    pub host: Geometry,
    /// Segments beside it that local clients write to, of the same size.
    pub ingest_segment_count: u32,
    /// Disk, per folder; none when its size is 0.
    pub disk: Option<Geometry>,
    /// Bytes that may be written to disk in a day.
    pub write_budget_per_day: Option<Size>,
    /// Loopback address of the Prometheus page.
    pub metrics: Option<SocketAddr>,
    /// Whether public namespaces may be attached to.
    pub allow_public: bool,
    /// File whose content makes tenants' salts unguessable.
    pub salt_secret_file: Option<PathBuf>,
    /// Filter of the log, as `tracing` reads it.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// The tenants; one of them at most has no token.
    pub tenants: Vec<Tenant>,
}

/// Segments of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of each.
    pub segment_bytes: u64,
    /// How many (of a disk: in each file).
    pub segment_count: u32,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// A tenant.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// Its name: 1 to 64 of a-z, 0-9, '.', '_', '-'.
    pub name: String,
    /// File with its token, readable by its owner alone. Without one: whoever comes over the Unix socket without a token.
    pub token_file: Option<PathBuf>,
    /// Most bytes of host memory.
    pub host_quota: Option<Size>,
    /// Most bytes of disk.
    pub disk_quota: Option<Size>,
}

/// What flags say; each wins over environment and file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--socket`
    pub socket: Option<PathBuf>,
    /// `--listen`
    pub listen: Option<SocketAddr>,
    /// `--dir`
    pub dir: Option<PathBuf>,
    /// `--host`, bytes
    pub host: Option<u64>,
    /// `--disk`, bytes
    pub disk: Option<u64>,
    /// `--token-file`: of the default tenant
    pub token_file: Option<PathBuf>,
    /// `--metrics`
    pub metrics: Option<SocketAddr>,
    /// `--log`
    pub log: Option<String>,
}

/// A configuration that cannot be meant: names the field, its value and what it must be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}; check the path given to --config")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no TOML, or has a field that does not exist or has another type.
    #[error("{path}: {source}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value outside its limits.
    #[error("{field} is `{value}`: {rule}")]
    Value {
        /// Name in the file.
        field: String,
        /// What it says.
        value: String,
        /// What it must be.
        rule: String,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    socket: Option<PathBuf>,
    socket_mode: Option<String>,
    listen: Option<SocketAddr>,
    dir: Option<PathBuf>,
    dirs: Option<Vec<PathBuf>>,
    host: Option<Size>,
    host_segment: Option<Size>,
    ingest: Option<Size>,
    disk: Option<Size>,
    disk_segment: Option<Size>,
    write_budget_per_day: Option<Size>,
    metrics: Option<SocketAddr>,
    allow_public: Option<bool>,
    salt_secret_file: Option<PathBuf>,
    log: Option<String>,
    log_format: Option<LogFormat>,
    token_file: Option<PathBuf>,
    #[serde(default)]
    tenants: Vec<Tenant>,
}

const GIB: u64 = 1 << 30;

/// Where the daemon listens, and clients look, when nothing else is said.
pub fn default_socket() -> PathBuf {
    runtime_folder().join("tender.sock")
}

fn runtime_folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| Path::new(folder).is_dir()) {
        return PathBuf::from(folder).join("tender");
    }
    match rustix::process::geteuid().as_raw() {
        0 => PathBuf::from("/run/tender"),
        uid => std::env::temp_dir().join(format!("tender-{uid}")),
    }
}

fn default_folder() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/tender");
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    cache.unwrap_or_else(runtime_folder).join("tender")
}

fn value_error(field: &str, value: impl ToString, rule: impl ToString) -> ConfigError {
    ConfigError::Value { field: field.to_owned(), value: value.to_string(), rule: rule.to_string() }
}

fn from_environment<T: std::str::FromStr>(name: &str) -> Result<Option<T>, ConfigError>
where
    T::Err: std::fmt::Display,
{
    match std::env::var(name) {
        Ok(text) if !text.is_empty() => text.parse().map(Some).map_err(|error: T::Err| value_error(name, &text, error)),
        _ => Ok(None),
    }
}

impl Config {
    /// Reads and checks a configuration.
    pub fn load(file: Option<&Path>, flags: &Overrides) -> Result<Self, ConfigError> {
        let mut written = match file {
            None => Written::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
                toml::from_str(&text)
                    .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?
            }
        };
        written.overlay(flags)?;
        written.check()
    }

    /// As TOML, for `Operator.Config`. Names files with secrets, never their content.
    pub fn to_toml(&self) -> String {
        let mut table = toml::Table::new();
        let mut text = |field: &str, value: String| table.insert(field.to_owned(), toml::Value::String(value));
        text("socket", self.socket.display().to_string());
        text("socket_mode", format!("{:04o}", self.socket_mode));
        text("host", Size(self.host.bytes()).to_string());
        text("host_segment", Size(self.host.segment_bytes).to_string());
        text("ingest", Size(u64::from(self.ingest_segment_count) * self.host.segment_bytes).to_string());
        let disk = self.disk.map_or(0, |disk| disk.bytes() * self.dirs.len() as u64);
        text("disk", Size(disk).to_string());
        if let Some(disk) = self.disk {
            text("disk_segment", Size(disk.segment_bytes).to_string());
        }
        for (field, address) in [("listen", self.listen), ("metrics", self.metrics)] {
            if let Some(address) = address {
                text(field, address.to_string());
            }
        }
        if let Some(budget) = self.write_budget_per_day {
            text("write_budget_per_day", budget.to_string());
        }
        if let Some(file) = &self.salt_secret_file {
            text("salt_secret_file", file.display().to_string());
        }
        text("log", self.log.clone());
        text("log_format", format!("{:?}", self.log_format).to_lowercase());
        let dirs = self.dirs.iter().map(|dir| toml::Value::String(dir.display().to_string())).collect();
        table.insert("dirs".to_owned(), toml::Value::Array(dirs));
        table.insert("allow_public".to_owned(), toml::Value::Boolean(self.allow_public));
        let tenants = self.tenants.iter().map(|tenant| {
            let mut row = toml::Table::new();
            row.insert("name".to_owned(), toml::Value::String(tenant.name.clone()));
            let quotas = [("host_quota", tenant.host_quota), ("disk_quota", tenant.disk_quota)];
            for (field, quota) in quotas.into_iter().filter_map(|(field, quota)| Some((field, quota?))) {
                row.insert(field.to_owned(), toml::Value::String(quota.to_string()));
            }
            if let Some(file) = &tenant.token_file {
                row.insert("token_file".to_owned(), toml::Value::String(file.display().to_string()));
            }
            toml::Value::Table(row)
        });
        table.insert("tenants".to_owned(), toml::Value::Array(tenants.collect()));
        table.to_string()
    }
}

impl Geometry {
    /// All of it.
    pub fn bytes(&self) -> u64 {
        self.segment_bytes * u64::from(self.segment_count)
    }

    /// Bytes of the file that holds it.
    pub fn file_bytes(&self) -> u64 {
        SEGMENTS_OFFSET + self.bytes()
    }

    /// Cuts `bytes` into about `count` segments of a power of two, not smaller than `least`.
    fn cut(field: &str, bytes: Size, segment: Option<Size>, count: u64, least: u64) -> Result<Self, ConfigError> {
        let segment_bytes = match segment {
            None => (bytes.0 / count).max(1).next_power_of_two().clamp(least, limits::SEGMENT_BYTES_MAX),
            Some(Size(segment)) => {
                if !(limits::SEGMENT_BYTES_MIN..=limits::SEGMENT_BYTES_MAX).contains(&segment)
                    || !segment.is_power_of_two()
                {
                    let rule = "a segment is a power of two from 16 MiB to 1 GiB";
                    return Err(value_error(&format!("{field}_segment"), Size(segment), rule));
                }
                segment
            }
        };
        let segment_count = bytes.0 / segment_bytes;
        if segment_count == 0 {
            let rule = format!("it must hold at least one segment of {}", Size(segment_bytes));
            return Err(value_error(field, bytes, rule));
        }
        let segments_max = u64::from(crate::names::SEGMENTS_MAX);
        if segment_count > segments_max {
            let rule = format!("at most {segments_max} segments of {} fit; give less", Size(segment_bytes));
            return Err(value_error(field, bytes, rule));
        }
        Ok(Self { segment_bytes, segment_count: segment_count as u32 })
    }
}

impl Written {
    fn overlay(&mut self, flags: &Overrides) -> Result<(), ConfigError> {
        let later = |flag: &Option<u64>, name: &str| -> Result<Option<Size>, ConfigError> {
            Ok(flag.map(Size).or(from_environment(name)?))
        };
        let path = |flag: &Option<PathBuf>, name: &str| -> Result<Option<PathBuf>, ConfigError> {
            Ok(flag.clone().or(from_environment(name)?))
        };
        self.socket = path(&flags.socket, "TENDER_SOCKET")?.or(self.socket.take());
        self.token_file = path(&flags.token_file, "TENDER_TOKEN_FILE")?.or(self.token_file.take());
        if let Some(dir) = path(&flags.dir, "TENDER_DIR")? {
            (self.dir, self.dirs) = (Some(dir), None);
        }
        self.host = later(&flags.host, "TENDER_HOST")?.or(self.host);
        self.disk = later(&flags.disk, "TENDER_DISK")?.or(self.disk);
        self.listen = flags.listen.or(from_environment("TENDER_LISTEN")?).or(self.listen);
        self.metrics = flags.metrics.or(from_environment("TENDER_METRICS")?).or(self.metrics);
        self.log = flags.log.clone().or(from_environment("TENDER_LOG")?).or(self.log.take());
        Ok(())
    }

    fn check(self) -> Result<Config, ConfigError> {
        let dirs = match (self.dir, self.dirs) {
            (Some(dir), Some(_)) => {
                return Err(value_error("dir", dir.display(), "give either `dir` or `dirs`, not both"));
            }
            (Some(dir), None) => vec![dir],
            (None, Some(dirs)) if dirs.is_empty() || dirs.len() > 16 => {
                return Err(value_error("dirs", dirs.len(), "1 to 16 folders are to be given"));
            }
            (None, Some(dirs)) => dirs,
            (None, None) => vec![default_folder()],
        };
        let memory = crate::doctor::memory_bytes();
        let host = self.host.unwrap_or(Size((memory / 8).min(GIB)));
        if host.0 > memory {
            let rule =
                format!("this machine has {}; give --host less, and leave room for engine and system", Size(memory));
            return Err(value_error("host", host, rule));
        }
        let host_geometry = Geometry::cut("host", host, self.host_segment, 64, limits::SEGMENT_BYTES_MIN)?;
        let ingest_segment_count = ingest_segments(self.ingest, &host_geometry, memory)?;
        let disk = self.disk.unwrap_or(Size(8 * GIB));
        let per_file = Size(disk.0 / dirs.len() as u64);
        let least = if per_file.0 < GIB { limits::SEGMENT_BYTES_MIN } else { limits::SEGMENT_BYTES_MAX / 16 };
        for (field, address) in [("listen", self.listen), ("metrics", self.metrics)] {
            if let Some(address) = address.filter(|address| !address.ip().is_loopback()) {
                let rule = "only loopback addresses (127.0.0.1, [::1]) are served: there is no encryption yet";
                return Err(value_error(field, address, rule));
            }
        }
        let socket = self.socket.unwrap_or_else(default_socket);
        if socket.as_os_str().len() > 107 - SOCKET_SUFFIX.len() {
            let rule = "a Unix socket's path has at most 107 bytes, of which `.door` for the local door takes 5; give a shorter one";
            return Err(value_error("socket", socket.display(), rule));
        }
        let mode = self.socket_mode.unwrap_or_else(|| "0600".to_owned());
        let socket_mode = u32::from_str_radix(&mode, 8)
            .ok()
            .filter(|bits| bits & !0o777 == 0)
            .ok_or_else(|| value_error("socket_mode", &mode, "octal mode bits such as \"0660\" are to be given"))?;
        Ok(Config {
            socket,
            socket_mode,
            listen: self.listen,
            host: host_geometry,
            ingest_segment_count,
            disk: match per_file.0 {
                0 => None,
                _ => Some(Geometry::cut("disk", per_file, self.disk_segment, 512, least)?),
            },
            dirs,
            write_budget_per_day: self.write_budget_per_day,
            metrics: self.metrics,
            allow_public: self.allow_public.unwrap_or(false),
            salt_secret_file: self.salt_secret_file,
            log: self.log.unwrap_or_else(|| "info".to_owned()),
            log_format: self.log_format.unwrap_or_default(),
            tenants: check_tenants(self.tenants, self.token_file, self.listen)?,
        })
    }
}

/// Segments of ingest memory: an eighth of host memory unless it is said, two at least, so that two clients need not wait for each other.
fn ingest_segments(ingest: Option<Size>, host: &Geometry, memory: u64) -> Result<u32, ConfigError> {
    let segment_bytes = host.segment_bytes;
    let wanted = ingest.unwrap_or(Size((host.bytes() / 8).next_multiple_of(segment_bytes).max(2 * segment_bytes)));
    if wanted.0 > memory {
        let rule = format!("this machine has {}; give less", Size(memory));
        return Err(value_error("ingest", wanted, rule));
    }
    let count = wanted.0.div_ceil(segment_bytes);
    let count_max = u64::from(crate::names::SEGMENTS_MAX - host.segment_count);
    if count > count_max {
        let rule = format!("at most {count_max} segments of {} fit beside host memory; give less", Size(segment_bytes));
        return Err(value_error("ingest", wanted, rule));
    }
    Ok(count as u32)
}

fn check_tenants(
    mut tenants: Vec<Tenant>,
    token_file: Option<PathBuf>,
    listen: Option<SocketAddr>,
) -> Result<Vec<Tenant>, ConfigError> {
    if tenants.is_empty() {
        tenants.push(Tenant { name: "default".to_owned(), token_file, host_quota: None, disk_quota: None });
    } else if let Some(file) = token_file {
        let rule = "with [[tenants]], each tenant names its own token_file";
        return Err(value_error("token_file", file.display(), rule));
    }
    if tenants.len() > limits::TENANTS_MAX {
        return Err(value_error("tenants", tenants.len(), format!("at most {} are served", limits::TENANTS_MAX)));
    }
    for (i, tenant) in tenants.iter().enumerate() {
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        if !(1..=64).contains(&tenant.name.len()) || !tenant.name.chars().all(is_name) {
            let rule = "a name has 1 to 64 of a-z, 0-9, '.', '_' and '-'";
            return Err(value_error(&format!("tenants[{i}].name"), &tenant.name, rule));
        }
        if tenants[..i].iter().any(|other| other.name == tenant.name) {
            return Err(value_error(&format!("tenants[{i}].name"), &tenant.name, "this name is taken already"));
        }
    }
    if tenants.iter().filter(|tenant| tenant.token_file.is_none()).count() > 1 {
        let rule = "only one tenant may do without a token_file: whoever comes over the Unix socket without a token";
        return Err(value_error("tenants", tenants.len(), rule));
    }
    if let Some(address) = listen.filter(|_| tenants.iter().all(|tenant| tenant.token_file.is_none())) {
        let rule = "over TCP everybody needs a token; give --token-file, or a token_file to a tenant";
        return Err(value_error("listen", address, rule));
    }
    Ok(tenants)
}
