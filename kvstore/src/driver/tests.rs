//! What comes to the core's thread in one go.

use tender_proto::descriptors::{Bell, EventFd};
use tender_proto::ring::{DaemonRing, RingMemory};
use tender_proto::{BlockLayout, Namespace, TenantSalt};

use super::*;
use crate::names::GroupId;
use crate::pipeline::{CoreConfig, TenantConfig};
use crate::verb::AttachVerb;

const TENANT: TenantId = TenantId(0);
const ATTACHMENT: AttachmentId = AttachmentId(7);

fn driver() -> (Driver, Receiver<DoorCommand>) {
    let arena = Arc::new(Arena::new(4 << 20, 1).unwrap());
    let name = "one".to_owned();
    let salt = TenantSalt::of_tenant(b"", &name);
    let core = Core::new(CoreConfig {
        tenants: vec![TenantConfig { name, salt, host_quota_bytes: None, disk_quota_bytes: None }],
        host_segment_bytes: arena.segment_bytes(),
        host_segment_count: arena.segment_count(),
        ingest_segment_count: 0,
        disk: None,
        write_bytes_per_day: None,
        allow_public: false,
        seed: 1,
    });
    let (mut driver, _) = Driver::new(core, 1, &arena, Vec::new(), Clock::start()).unwrap();
    let (sender, commands) = sync_channel(16);
    let door = Queue::new(sender, &driver.sleeper);
    driver.serve_door(door);
    (driver, commands)
}

/// All of these are taken before the core hears of the first.
fn take(driver: &mut Driver, inputs: Vec<Input>) {
    let (mut events, mut actions) = (Vec::new(), Vec::new());
    inputs.into_iter().for_each(|input| driver.queue().try_send(input).unwrap());
    assert!(driver.gather(&mut events));
    for event in events.drain(..) {
        driver.core.step(event, 0, &mut actions);
    }
    driver.carry_out(&mut actions, &mut events);
}

fn ask(verb: Verb) -> Input {
    let request = Request { id: RequestId(u64::MAX), tenant: TENANT, deadline_ms: 0, verb };
    Input::Ask(request, Responder::Once(oneshot::channel().0))
}

fn attach() -> Input {
    ask(Verb::Attach(Box::new(AttachVerb {
        attachment: ATTACHMENT,
        group: "engine".to_owned(),
        member: String::new(),
        namespace: Namespace::text("model", "bf16", 16),
        layout: BlockLayout::opaque(16 << 10),
        expected_root: None,
    })))
}

fn join(connection: u64) -> Input {
    let (memory, _) = RingMemory::create().unwrap();
    let member = Member { attachment: ATTACHMENT, tenant: TENANT, group: GroupId(0), verify: false };
    let (ring, doorbell) = (DaemonRing::format(memory).unwrap(), EventFd::new().unwrap());
    Input::Join(connection, None, Box::new(Local { member, ring, doorbell, bell: Bell::new().unwrap().0 }))
}

#[test]
fn who_detaches_while_it_joins_gets_no_ring() {
    let (mut driver, commands) = driver();
    take(&mut driver, vec![attach()]);
    take(&mut driver, vec![join(3), ask(Verb::Detach(ATTACHMENT))]);
    assert!(driver.locals.is_empty(), "a ring that the core knows nothing of");
    assert!(matches!(commands.try_recv(), Ok(DoorCommand::Left(ATTACHMENT))));
    assert!(matches!(commands.try_recv(), Ok(DoorCommand::Joined(3, Err(why))) if why.contains("attach again")));
    // Whoever attaches again is let in.
    take(&mut driver, vec![attach()]);
    take(&mut driver, vec![join(4)]);
    assert!(matches!(commands.try_recv(), Ok(DoorCommand::Joined(4, Ok(TENANT)))));
    assert!(!driver.locals.is_empty());
}
