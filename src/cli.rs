//! The command line: parses, dispatches, and turns failures into exit statuses.

use std::future::Future;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::commands::{demo, doctor, get, lookup, purge, put, replay, replay_client, serve, status, watch};
use crate::failure::Failure;

/// KV-cache store that rides beside an LLM inference engine.
#[derive(Parser, Debug)]
#[command(name = "tender", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the store of this node
    Serve(serve::Serve),
    /// Show the tiers, tenants and counters of a daemon
    Status(status::Status),
    /// Say what was found on this machine, what is used instead, and the cure
    Doctor(doctor::Doctor),
    /// Store the blocks of a prompt
    Put(put::Put),
    /// Fetch the blocks of a prompt
    Get(get::Get),
    /// Ask where the blocks of a prompt are
    Lookup(lookup::Lookup),
    /// Forget the blocks of a prompt, or of a namespace
    Purge(purge::Purge),
    /// Follow the blocks that come and go
    Watch(watch::Watch),
    /// Replay a workload trace through the store, comparing every byte
    Replay(replay::Replay),
    /// Show the store at work on a generated agent workload, in under a minute
    Demo(demo::Demo),
    /// A client process of `replay`
    #[command(hide = true)]
    ReplayClient(replay_client::ReplayClient),
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Serve(serve) if serve.is_replacement() => block_on(serve.replace()),
        Command::Serve(serve) => serve.run(),
        Command::Status(status) => block_on(status.run()),
        Command::Doctor(doctor) => block_on(doctor.run()),
        Command::Put(put) => block_on(put.run()),
        Command::Get(get) => block_on(get.run()),
        Command::Lookup(lookup) => block_on(lookup.run()),
        Command::Purge(purge) => block_on(purge.run()),
        Command::Watch(watch) => block_on(watch.run()),
        Command::Replay(replay) => block_on(replay.run()),
        Command::Demo(demo) => block_on(demo.run()),
        Command::ReplayClient(client) => block_on(client.run()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(),
    }
}

/// Runs on this thread and as many more as there are processors.
fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(Failure::of("cannot start threads"))?;
    let done = runtime.block_on(work);
    // A thread that still reads standard input must not hold up the end.
    runtime.shutdown_background();
    done
}
