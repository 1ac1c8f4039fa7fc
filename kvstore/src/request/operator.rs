//! What an operator asks: status, configuration, another worker.

use std::sync::{Arc, Mutex, PoisonError};

use tender_proto::wire;
use tonic::{Request, Response, Status};

use super::identity::{Identities, Rights};
use super::server::status;
use crate::config::Config;
use crate::doctor::{Finding, Verdict};
use crate::driver::CoreHandle;
use crate::keeper::Keeper;
use crate::limits;
use crate::names::TenantId;
use crate::status::{CoreStatus, Health, TierStatus};
use crate::verb::{Reply, Verb};

/// Serves `tender.v1.Operator`.
#[derive(Clone)]
pub struct OperatorServer {
    /// The way to the core.
    pub core: CoreHandle,
    /// Who asks.
    pub identities: Arc<Identities>,
    /// The daemon's configuration.
    pub config: Arc<Config>,
    /// What was found at start, and of the disk when it joined.
    pub findings: Arc<Mutex<Vec<Finding>>>,
    /// Of this start.
    pub epoch: u64,
    /// Who starts the next worker.
    pub keeper: Arc<Keeper>,
}

fn tier(tier: wire::Tier, state: String, note: String, status: &TierStatus) -> wire::TierStatus {
    let classes = status.classes.iter().map(|&(slot_bytes, segments, slots, used_slots)| wire::SizeClass {
        slot_bytes,
        segments,
        slots,
        used_slots,
    });
    wire::TierStatus {
        tier: tier.into(),
        state,
        capacity_bytes: status.capacity_bytes,
        ready_bytes: status.usage.ready_bytes,
        used_bytes: status.usage.used_bytes,
        blocks: status.blocks,
        slots: status.usage.slots,
        leased_slots: status.leased_slots,
        busy_slots: status.busy_slots,
        note,
        classes: classes.collect(),
    }
}

fn tiers(status: &CoreStatus) -> Vec<wire::TierStatus> {
    let host = &status.host;
    let ready = host.usage.ready_bytes == host.capacity_bytes;
    let state = if ready { "ready" } else { "preparing" };
    let mut tiers = vec![tier(wire::Tier::Host, state.to_owned(), String::new(), host)];
    match &status.disk {
        None => tiers.push(wire::TierStatus {
            tier: wire::Tier::Disk.into(),
            state: "off".to_owned(),
            ..Default::default()
        }),
        Some((disk, health)) => {
            let (state, note) = match *health {
                Health::Good => ("ready", String::new()),
                Health::Degraded(failures) => ("degraded", format!("{failures} requests failed in a row; see the log")),
                Health::AWAITED => (
                    "awaited",
                    "its files are not there yet: host memory is served without them, and nothing is written back; if this lasts for \
                     more than seconds, the log says why"
                        .to_owned(),
                ),
                Health::Disabled(_) => (
                    "disabled",
                    "it failed again and again and is tried now and then; see the log, replace the disk".to_owned(),
                ),
            };
            tiers.push(tier(wire::Tier::Disk, state.to_owned(), note, disk));
        }
    }
    tiers
}

fn finding(finding: &Finding) -> wire::Finding {
    wire::Finding {
        what: finding.what.clone(),
        found: finding.found.clone(),
        verdict: match finding.verdict {
            Verdict::Good => wire::Verdict::Good.into(),
            Verdict::Fallback => wire::Verdict::Fallback.into(),
            Verdict::Bad => wire::Verdict::Bad.into(),
        },
        cure: finding.cure.clone(),
    }
}

#[tonic::async_trait]
impl wire::operator_server::Operator for OperatorServer {
    async fn status(&self, request: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        let rights = self.identities.rights(&request)?;
        let answer = self.core.ask(TenantId(0), limits::DEADLINE_DEFAULT, Verb::Status).await.map_err(status)?;
        let Reply::Status(core) = answer.reply else {
            return Err(Status::internal("the core did not answer for its status"));
        };
        let tenants = core.tenants.iter().zip(0u16..);
        let tenants = tenants.filter(|(_, id)| rights == Rights::Operator || rights == Rights::Tenant(TenantId(*id)));
        let tenants = tenants.map(|(tenant, _)| wire::TenantStatus {
            tenant: tenant.name.clone(),
            host_bytes: tenant.host.0,
            host_quota_bytes: tenant.host.1.unwrap_or(0),
            disk_bytes: tenant.disk.0,
            disk_quota_bytes: tenant.disk.1.unwrap_or(0),
            blocks: tenant.blocks,
        });
        let mut reply = wire::StatusReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: self.core.clock().now_ms(),
            epoch: self.epoch,
            process_id: std::process::id(),
            tenants: tenants.collect(),
            ..Default::default()
        };
        // Sums over all tenants would tell one what the others do.
        if rights == Rights::Operator {
            reply.tiers = tiers(&core);
            let findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
            reply.findings = findings.iter().map(finding).collect();
            reply.attachments = core.attachments as u32;
            let counter = |(name, _, value): (&str, &str, u64)| wire::Counter { name: name.to_owned(), value };
            reply.counters = core.counters.all().into_iter().map(counter).collect();
        }
        Ok(Response::new(reply))
    }

    async fn replace(&self, request: Request<wire::ReplaceRequest>) -> Result<Response<wire::ReplaceReply>, Status> {
        if self.identities.rights(&request)? != Rights::Operator {
            return Err(Status::permission_denied(
                "another worker is for the operator to ask for: ask over the Unix socket as the daemon's own user or root",
            ));
        }
        let keeper = Arc::clone(&self.keeper);
        // It may wait for the keeper, which no thread of the runtime should.
        let said = tokio::task::spawn_blocking(move || keeper.replace()).await;
        match said.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(()) => Ok(Response::new(wire::ReplaceReply {})),
            Err(error) => Err(Status::internal(format!(
                "the keeper does not listen ({error}); stop the daemon and start it anew"
            ))),
        }
    }

    async fn config(&self, request: Request<wire::ConfigRequest>) -> Result<Response<wire::ConfigReply>, Status> {
        match self.identities.rights(&request)? {
            Rights::Operator => Ok(Response::new(wire::ConfigReply { toml: self.config.to_toml() })),
            Rights::Tenant(_) => Err(Status::permission_denied(
                "the configuration is for the operator: ask over the Unix socket as the daemon's own user or root",
            )),
        }
    }
}
