//! This executable as a child process. All children end before this process does: told to when it ends in good order, and by the
//! kernel when it does not.

use std::fs::File;
use std::io::Read as _;

use tokio::process::Command;

use crate::failure::Failure;

/// A subcommand as a child: in a process group of its own, so that Ctrl-C reaches the parent alone, which then ends its children.
pub fn child(subcommand: &str) -> Result<Command, Failure> {
    let executable = std::env::current_exe().map_err(Failure::of("cannot find this program's own file"))?;
    let mut command = Command::new(executable);
    command.arg(subcommand).arg("--parent").arg(std::process::id().to_string());
    command.process_group(0).kill_on_drop(true);
    // Flags of this command must not become the child's by way of the environment.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TENDER_") {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// Bytes that nobody can guess.
pub fn random_bytes<const LENGTH: usize>() -> Result<[u8; LENGTH], Failure> {
    let mut bytes = [0; LENGTH];
    let read = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes));
    read.map_err(Failure::of("cannot read /dev/urandom"))?;
    Ok(bytes)
}
