//! The `tender` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    tender::cli::main()
}
