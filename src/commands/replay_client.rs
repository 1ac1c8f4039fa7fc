//! `tender replay-client`: a client process of `tender replay`, which starts it and speaks to it over its standard input and output.

use clap::Args;

use crate::failure::Failure;
use crate::lifeline::die_with;
use crate::replay::client;

/// Started by `tender replay` only.
#[derive(Args, Debug)]
pub struct ReplayClient {
    /// End when this process does
    #[arg(long)]
    parent: u32,
}

impl ReplayClient {
    /// Serves jobs until the input ends.
    pub async fn run(self) -> Result<(), Failure> {
        die_with(self.parent)?;
        client::run().await
    }
}
