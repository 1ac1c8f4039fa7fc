//! `tender purge`: forgets blocks for good.

use clap::Args;
use serde_json::json;
use tender_client::BlockStore as _;

use crate::connect::{Connection, DoorArgs};
use crate::failure::Failure;
use crate::identity::{NamespaceArgs, TokensArgs};
use crate::output::{Output, table};
use crate::units;

/// Forgets the blocks of a prompt, or with --namespace all of a namespace. They do not come back after a crash.
#[derive(Args, Debug)]
pub struct Purge {
    #[command(flatten)]
    identity: NamespaceArgs,
    #[command(flatten)]
    tokens: TokensArgs,
    /// Forget everything under the namespace; needs --yes
    #[arg(long, conflicts_with_all = ["tokens", "tokens_file", "text"], requires = "yes")]
    namespace: bool,
    /// Yes, everything
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    door: DoorArgs,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

impl Purge {
    /// Purges and tells how much.
    pub async fn run(self) -> Result<(), Failure> {
        let tokens = if self.namespace { Vec::new() } else { self.tokens.read(self.identity.block_tokens)? };
        let store = self.connection.attach(self.identity.namespace(), self.identity.layout(), self.door.door).await?;
        let keys = store.terms().chain(&tokens);
        let what = if self.namespace { tender_client::Purge::Namespace } else { tender_client::Purge::Keys(&keys) };
        let purged = store.purge(what).await;
        store.close().await;
        if self.output.json {
            self.output.object(&json!({
                "purged_blocks": purged.purged_blocks, "busy_blocks": purged.busy_blocks, "complete": purged.complete,
            }))?;
        } else {
            let rows = [("forgotten", purged.purged_blocks), ("of these, still in use", purged.busy_blocks)];
            self.output
                .line(table(["", "blocks"], rows.map(|(name, blocks)| [name.to_owned(), units::count(blocks)])))?;
        }
        if purged.complete {
            return Ok(());
        }
        Err(Failure::message("the daemon did not finish in time or went away; see `tender status`, then purge again"))
    }
}
