//! What this machine gives: each thing that makes the daemon faster or safer, found or not, and what to do about it. Said at start and
//! by `tender doctor`; nothing here stops the daemon.

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::device::block::PAGE_BYTES;
use crate::device::shared::SharedFile;
use crate::size::Size;

/// One thing looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub what: String,
    /// What was found.
    pub found: String,
    /// How good that is.
    pub verdict: Verdict,
    /// What to do; empty when all is well.
    pub cure: String,
}

/// How good something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As wished.
    Good,
    /// Works, more slowly or with less safety.
    Fallback,
    /// The daemon cannot start, or will not do what was asked.
    Bad,
}

impl Finding {
    pub(crate) fn new(what: &str, found: impl Into<String>, verdict: Verdict, cure: impl Into<String>) -> Self {
        Self { what: what.to_owned(), found: found.into(), verdict, cure: cure.into() }
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// Memory of this machine, or of the control group that this process is in.
pub fn memory_bytes() -> u64 {
    let total = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(u64::MAX, |kilobytes| kilobytes * 1024);
    let group = read("/sys/fs/cgroup/memory.max").parse().unwrap_or(u64::MAX);
    total.min(group)
}

/// Looks at everything; changes nothing.
pub fn doctor(config: &Config) -> Vec<Finding> {
    let mut findings = vec![memory(config), huge_pages(), memlock(config), shared_memory(), io_uring()];
    for (dir, index) in config.dirs.iter().zip(0u32..) {
        if config.disk.is_some() {
            findings.push(folder(config, dir, index));
        }
    }
    findings.push(socket(&config.socket));
    findings
}

fn memory(config: &Config) -> Finding {
    let (host, memory) = (Size(config.host.bytes()), Size(memory_bytes()));
    let ingest = Size(u64::from(config.ingest_segment_count) * config.host.segment_bytes);
    let found = format!("{host} of {memory} for the host tier, {ingest} more for what local clients write");
    if host.0 + ingest.0 > memory.0 / 10 * 9 {
        return Finding::new(
            "memory",
            found,
            Verdict::Fallback,
            "leave a tenth of memory to engine and system: --host less",
        );
    }
    Finding::new("memory", found, Verdict::Good, "")
}

fn huge_pages() -> Finding {
    let setting = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let chosen = setting.split(['[', ']']).nth(1).unwrap_or("not known").to_owned();
    let verdict = if matches!(chosen.as_str(), "always" | "madvise") { Verdict::Good } else { Verdict::Fallback };
    let cure = match verdict {
        Verdict::Good => "",
        _ => "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    };
    Finding::new("transparent huge pages", chosen, verdict, cure)
}

fn memlock(config: &Config) -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    let is_root = rustix::process::geteuid().is_root();
    let found = match limit {
        _ if is_root => "not limited for root".to_owned(),
        None => "unlimited".to_owned(),
        Some(limit) => Size(limit).to_string(),
    };
    if is_root || limit.is_none_or(|limit| limit >= config.host.bytes()) {
        return Finding::new("memlock", found, Verdict::Good, "");
    }
    let cure = "raise it (LimitMEMLOCK=infinity in the unit, or ulimit -l): pages may be swapped, and io_uring copies";
    Finding::new("memlock", found, Verdict::Fallback, cure)
}

/// Whether clients could change what they read in place.
fn shared_memory() -> Finding {
    match SharedFile::create(PAGE_BYTES) {
        Ok(file) if file.cure().is_empty() => Finding::new("shared memory", file.describe(), Verdict::Good, ""),
        Ok(file) => Finding::new("shared memory", file.describe(), Verdict::Fallback, file.cure()),
        Err(error) => {
            let cure = "raise the limit of open files (ulimit -n), and leave some memory free";
            Finding::new("shared memory", format!("refused: {error}"), Verdict::Bad, cure)
        }
    }
}

fn io_uring() -> Finding {
    match io_uring::IoUring::new(8) {
        Ok(_) => Finding::new("io_uring", "works", Verdict::Good, ""),
        Err(error) => {
            let cure = "sysctl -w kernel.io_uring_disabled=0, or allow it in the container's seccomp profile; until then threads \
                        read and write the disk";
            Finding::new("io_uring", format!("refused: {error}"), Verdict::Fallback, cure)
        }
    }
}

fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn folder(config: &Config, dir: &Path, index: u32) -> Finding {
    let what = format!("folder {}", dir.display());
    let base = existing(dir);
    let Ok(stat) = rustix::fs::statvfs(&base) else {
        return Finding::new(&what, "cannot be looked at", Verdict::Bad, "give another --dir");
    };
    if rustix::fs::access(&base, rustix::fs::Access::WRITE_OK).is_err() {
        let cure = "give a --dir that this user may write to";
        return Finding::new(&what, format!("{} is not writable", base.display()), Verdict::Bad, cure);
    }
    let wanted = config.disk.map_or(0, |disk| disk.file_bytes());
    let there = std::fs::metadata(dir.join(crate::serve::tier_file_name(index))).map_or(0, |file| file.len());
    let free = stat.f_bavail * stat.f_frsize + there;
    let direct = takes_direct(&base);
    let found =
        format!("{} free, {} wanted, O_DIRECT {}", Size(free), Size(wanted), if direct { "works" } else { "refused" });
    if free < wanted {
        return Finding::new(&what, found, Verdict::Bad, "free some room, give less with --disk, or another --dir");
    }
    if !direct {
        let cure = "put --dir on ext4 or xfs: here reads and writes go through the page cache, and take its memory";
        return Finding::new(&what, found, Verdict::Fallback, cure);
    }
    Finding::new(&what, found, Verdict::Good, "")
}

/// Tries O_DIRECT on a file without a name.
fn takes_direct(folder: &Path) -> bool {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR).is_ok()
}

fn socket(path: &Path) -> Finding {
    let found = path.display().to_string();
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Finding::new("socket", format!("{found}: a daemon answers"), Verdict::Good, "");
    }
    let parent = existing(path);
    if rustix::fs::access(&parent, rustix::fs::Access::WRITE_OK).is_err() {
        return Finding::new("socket", found, Verdict::Bad, "give a --socket in a folder that this user may write to");
    }
    Finding::new("socket", format!("{found}: free"), Verdict::Good, "")
}
