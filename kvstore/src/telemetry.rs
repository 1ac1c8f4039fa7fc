//! What the daemon says of itself: log lines through `tracing`, numbers through `metrics`. The only file that names either's backend.

use std::net::SocketAddr;

use metrics_exporter_prometheus::PrometheusBuilder;
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;
use crate::status::{CoreStatus, Counters, TierStatus};

/// Log lines go to stderr, by the filter of the configuration. Returns what is wrong with that filter.
pub fn start_log(filter: &str, format: LogFormat) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    let color = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(color).with_writer(std::io::stderr);
    // A process that set a subscriber already (a test) keeps it.
    let _ = match format {
        LogFormat::Text => lines.with_target(false).try_init(),
        LogFormat::Json => lines.json().try_init(),
    };
    Ok(())
}

/// Serves the numbers for Prometheus. Must be called within a tokio runtime.
pub fn start_metrics(address: SocketAddr) -> Result<(), String> {
    let exporter = PrometheusBuilder::new().with_http_listener(address).build();
    let (recorder, serve) = exporter.map_err(|error| error.to_string())?;
    metrics::set_global_recorder(recorder).map_err(|error| error.to_string())?;
    tokio::spawn(async move {
        if serve.await.is_err() {
            tracing::error!("the metrics page stopped");
        }
    });
    for (name, meaning, _) in Counters::default().all() {
        metrics::describe_counter!(name, meaning);
    }
    metrics::describe_gauge!("tender_tier_used_bytes", metrics::Unit::Bytes, "bytes of used slots, by tier");
    metrics::describe_gauge!("tender_tier_capacity_bytes", metrics::Unit::Bytes, "bytes of a tier");
    metrics::describe_gauge!("tender_tier_blocks", "blocks with a copy in a tier");
    metrics::describe_gauge!("tender_leased_slots", "slots of host memory that somebody reads");
    metrics::describe_gauge!("tender_tenant_used_bytes", metrics::Unit::Bytes, "bytes of slots of a tenant, by tier");
    metrics::describe_histogram!("tender_request_seconds", metrics::Unit::Seconds, "time of a request, by verb");
    Ok(())
}

/// Puts what the core counts on the page.
pub fn publish(status: &CoreStatus) {
    for (name, _, value) in status.counters.all() {
        metrics::counter!(name).absolute(value);
    }
    let tier = |name: &'static str, tier: &TierStatus| {
        metrics::gauge!("tender_tier_used_bytes", "tier" => name).set(tier.usage.used_bytes as f64);
        metrics::gauge!("tender_tier_capacity_bytes", "tier" => name).set(tier.capacity_bytes as f64);
        metrics::gauge!("tender_tier_blocks", "tier" => name).set(tier.blocks as f64);
    };
    tier("host", &status.host);
    if let Some((disk, _)) = &status.disk {
        tier("disk", disk);
    }
    metrics::gauge!("tender_leased_slots").set(status.host.leased_slots as f64);
    for tenant in &status.tenants {
        for (tier, (used, _)) in [("host", tenant.host), ("disk", tenant.disk)] {
            metrics::gauge!("tender_tenant_used_bytes", "tenant" => tenant.name.clone(), "tier" => tier)
                .set(used as f64);
        }
    }
}

/// How long a request took.
pub fn request_done(verb: &'static str, took: std::time::Duration) {
    metrics::histogram!("tender_request_seconds", "verb" => verb).record(took.as_secs_f64());
}
