//! `tender lookup`: where the blocks of a prompt are.

use clap::Args;
use serde_json::json;
use tender_client::BlockStore as _;

use crate::connect::{Connection, DoorArgs};
use crate::failure::Failure;
use crate::identity::{NamespaceArgs, TokensArgs};
use crate::output::{Output, table};
use crate::units;

/// Asks which blocks of a prompt are in which tier, and how many of them from the first on are usable.
#[derive(Args, Debug)]
pub struct Lookup {
    #[command(flatten)]
    namespace: NamespaceArgs,
    #[command(flatten)]
    tokens: TokensArgs,
    #[command(flatten)]
    door: DoorArgs,
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

impl Lookup {
    /// Asks and shows.
    pub async fn run(self) -> Result<(), Failure> {
        let tokens = self.tokens.read(self.namespace.block_tokens)?;
        let store = self.connection.attach(self.namespace.namespace(), self.namespace.layout(), self.door.door).await?;
        let keys = store.terms().chain(&tokens);
        let found = store.lookup(&keys).await;
        store.close().await;
        let there = |tier: &[bool]| tier.iter().filter(|there| **there).count() as u64;
        let prefix_tokens = found.prefix_blocks as u64 * u64::from(self.namespace.block_tokens);
        let (host_blocks, disk_blocks) = (there(&found.host), there(&found.disk));
        if self.output.json {
            return self.output.object(&json!({
                "blocks": keys.len(), "prefix_blocks": found.prefix_blocks, "prefix_tokens": prefix_tokens,
                "host_blocks": host_blocks, "disk_blocks": disk_blocks,
            }));
        }
        let rows = [
            ("of the prompt", keys.len() as u64),
            ("usable, from the first on", found.prefix_blocks as u64),
            ("in host memory", host_blocks),
            ("on disk", disk_blocks),
        ];
        self.output.line(table(["blocks", ""], rows.map(|(name, blocks)| [name.to_owned(), units::count(blocks)])))
    }
}
