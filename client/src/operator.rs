//! What an operator asks a daemon: how it is, and how it is set.

use tender_proto::wire;
use tender_proto::wire::operator_client::OperatorClient;
use tonic::transport::Channel;

use crate::AttachError;
use crate::remote::{Door, Target};

/// Thousands of tenants at 100 bytes and thousands of size classes are a few MiB.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// Asks a daemon about itself; joins no group and needs no namespace.
///
/// Each question opens its own connection, which over loopback costs less than the answer: an operator who watches a daemon go and
/// come back needs no state for it. Errors are those of attaching, and like them say the cure.
#[derive(Clone, Debug)]
pub struct Operator {
    door: Door,
}

impl Operator {
    /// Looks whether a daemon is there. With a `token` the answers are for its tenant, else for whoever the socket says we are.
    pub async fn connect(target: Target, token: Option<String>) -> Result<Self, AttachError> {
        let operator = Self { door: Door::new(target, token)? };
        operator.client().await?;
        Ok(operator)
    }

    /// Tiers, tenants, findings and counters.
    pub async fn status(&self) -> Result<wire::StatusReply, AttachError> {
        let mut client = self.client().await?;
        self.door.first_answer(client.status(self.door.request(wire::StatusRequest {}))).await
    }

    /// The configuration in force, as TOML, without secrets.
    pub async fn config(&self) -> Result<String, AttachError> {
        let mut client = self.client().await?;
        let reply = self.door.first_answer(client.config(self.door.request(wire::ConfigRequest {}))).await?;
        Ok(reply.toml)
    }

    /// Has the daemon end its worker in good order and start the next one. Returns before that one serves. For the daemon's own user and
    /// root.
    pub async fn replace(&self) -> Result<(), AttachError> {
        let mut client = self.client().await?;
        let _nothing = self.door.first_answer(client.replace(self.door.request(wire::ReplaceRequest {}))).await?;
        Ok(())
    }

    async fn client(&self) -> Result<OperatorClient<Channel>, AttachError> {
        let channel = self.door.connect().await?;
        Ok(OperatorClient::new(channel).max_decoding_message_size(REPLY_BYTES_MAX))
    }
}
