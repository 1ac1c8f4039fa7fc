//! `tender status`: what a daemon holds and does.

use std::time::Duration;

use clap::Args;
use serde_json::{Map, Value, json};
use tender_client::proto::wire::{StatusReply, TenantStatus, Tier, TierStatus};

use crate::connect::Connection;
use crate::failure::Failure;
use crate::output::{Output, table};
use crate::units;

/// Shows the tiers, tenants and counters of a daemon.
#[derive(Args, Debug)]
pub struct Status {
    #[command(flatten)]
    connection: Connection,
    #[command(flatten)]
    output: Output,
}

impl Status {
    /// Asks and shows.
    pub async fn run(self) -> Result<(), Failure> {
        let status = self.connection.operator().await?.status().await?;
        if self.output.json { self.output.object(&object(&status)) } else { show(&status, self.output) }
    }
}

fn name(tier: i32) -> &'static str {
    match Tier::try_from(tier) {
        Ok(Tier::Host) => "host",
        Ok(Tier::Disk) => "disk",
        Ok(Tier::Peer) => "peer",
        Ok(Tier::Object) => "object",
        Ok(Tier::Device) => "device",
        Ok(Tier::Unspecified) | Err(_) => "unknown",
    }
}

fn show(status: &StatusReply, output: Output) -> Result<(), Failure> {
    let StatusReply { version, process_id, uptime_ms, attachments, .. } = status;
    let up = units::duration(Duration::from_millis(*uptime_ms));
    output.line(format_args!("tender {version}, process {process_id}, up {up}, {attachments} attached"))?;
    let tiers = status.tiers.iter().map(|tier| {
        [
            name(tier.tier).to_owned(),
            tier.state.clone(),
            units::bytes(tier.used_bytes),
            units::bytes(tier.capacity_bytes),
            units::bytes(tier.ready_bytes),
            units::count(tier.blocks),
            units::count(tier.slots),
            units::count(tier.leased_slots),
            units::count(tier.busy_slots),
        ]
    });
    output.line(table(["tier", "state", "used", "of", "prepared", "blocks", "slots", "leased", "busy"], tiers))?;
    for tier in status.tiers.iter().filter(|tier| !tier.note.is_empty()) {
        output.line(format_args!("{}: {}", name(tier.tier), tier.note))?;
    }
    let quota = |bytes| if bytes == 0 { "none".to_owned() } else { units::bytes(bytes) };
    let tenants = status.tenants.iter().map(|tenant| {
        [
            tenant.tenant.clone(),
            units::count(tenant.blocks),
            units::bytes(tenant.host_bytes),
            quota(tenant.host_quota_bytes),
            units::bytes(tenant.disk_bytes),
            quota(tenant.disk_quota_bytes),
        ]
    });
    output.line(table(["tenant", "blocks", "host", "host quota", "disk", "disk quota"], tenants))?;
    let counters = status.counters.iter().filter(|counter| counter.value > 0);
    let counters = counters.map(|counter| [counter.name.clone(), units::count(counter.value)]);
    output.line(table(["counter", "value"], counters))
}

fn object(status: &StatusReply) -> Value {
    let tier = |tier: &TierStatus| {
        let classes = tier.classes.iter().map(|class| {
            json!({
                "slot_bytes": class.slot_bytes, "segments": class.segments, "slots": class.slots, "used_slots": class.used_slots,
            })
        });
        json!({
            "tier": name(tier.tier), "state": tier.state, "note": tier.note, "capacity_bytes": tier.capacity_bytes,
            "ready_bytes": tier.ready_bytes, "used_bytes": tier.used_bytes, "blocks": tier.blocks, "slots": tier.slots,
            "leased_slots": tier.leased_slots, "busy_slots": tier.busy_slots, "classes": classes.collect::<Vec<_>>(),
        })
    };
    let tenant = |tenant: &TenantStatus| {
        json!({
            "tenant": tenant.tenant, "blocks": tenant.blocks, "host_bytes": tenant.host_bytes,
            "host_quota_bytes": tenant.host_quota_bytes, "disk_bytes": tenant.disk_bytes,
            "disk_quota_bytes": tenant.disk_quota_bytes,
        })
    };
    let counters: Map<String, Value> =
        status.counters.iter().map(|counter| (counter.name.clone(), counter.value.into())).collect();
    json!({
        "version": status.version, "process_id": status.process_id, "uptime_ms": status.uptime_ms,
        "epoch": format!("{:016x}", status.epoch), "attachments": status.attachments,
        "tiers": status.tiers.iter().map(tier).collect::<Vec<_>>(),
        "tenants": status.tenants.iter().map(tenant).collect::<Vec<_>>(), "counters": counters,
    })
}
