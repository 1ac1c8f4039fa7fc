//! A client process of a replay: takes jobs from its standard input, serves them, and tells what became of every request.

use std::io::{BufRead as _, Write as _, stdin, stdout};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tender_client::proto::{BlockLayout, Namespace};
use tender_client::{Attach, BlockStore as _, Remote};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep};

use super::chain::keys_of;
use super::protocol::{FromClient, RequestJob, SessionJob, Setup, ToClient};
use super::request::{Served, Server};
use super::session::RunningSession;
use crate::connect::{Connection, Door};
use crate::failure::Failure;
use crate::trace::session_json;

/// A worker that is being started needs about as long.
const ATTACH_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// Serves jobs until the input ends.
pub async fn run() -> Result<(), Failure> {
    let (to_parent, answers) = mpsc::unbounded_channel();
    let (hear, mut heard) = mpsc::channel(1);
    thread::spawn(move || write(answers));
    thread::spawn(move || stdin().lock().lines().map_while(Result::ok).try_for_each(|line| hear.blocking_send(line)));
    let mut worker = None;
    while let Some(line) = heard.recv().await {
        let job: ToClient =
            serde_json::from_str(&line).map_err(|error| Failure::message(format_args!("no job: {error}")))?;
        match (job, &worker) {
            (ToClient::Setup(setup), _) => match Worker::new(setup).await {
                Ok(attached) => {
                    worker = Some(Arc::new(attached));
                    say(&to_parent, FromClient::Ready);
                }
                Err(failure) => say(&to_parent, FromClient::Failed(reason(failure))),
            },
            (ToClient::Session(job), Some(worker)) => {
                tokio::spawn(Arc::clone(worker).session(job, to_parent.clone()));
            }
            (ToClient::Request(job), Some(worker)) => {
                tokio::spawn(Arc::clone(worker).request(job, to_parent.clone()));
            }
            (_, None) => return Err(Failure::message("a job came before the setup")),
        }
    }
    // The end of input means that the parent has all it wants, or is gone: whatever still runs is of no use to anybody.
    if let Some(worker) = worker.and_then(Arc::into_inner) {
        for server in worker.servers {
            server.into_store().close().await;
        }
    }
    Ok(())
}

type Answers = mpsc::UnboundedSender<FromClient>;

fn say(to_parent: &Answers, answer: FromClient) {
    // The writer goes only when the parent has gone, and then the end of input follows.
    drop(to_parent.send(answer));
}

fn reason(failure: Failure) -> String {
    match failure {
        Failure::Message(text) => text,
        other => format!("{other:?}"),
    }
}

fn write(mut answers: mpsc::UnboundedReceiver<FromClient>) {
    while let Some(answer) = answers.blocking_recv() {
        let Ok(mut line) = serde_json::to_vec(&answer) else { continue };
        line.push(b'\n');
        if stdout().lock().write_all(&line).is_err() {
            return;
        }
    }
}

/// One attached store per tenant.
struct Worker {
    servers: Vec<Server<Remote>>,
    turns: Semaphore,
    block_tokens: u32,
}

/// The namespace of a run.
pub fn namespace(generation: u64, block_tokens: u32) -> Namespace {
    Namespace { revision: format!("replay-{generation:016x}"), ..Namespace::text("tender-replay", "u8", block_tokens) }
}

impl Worker {
    async fn new(setup: Setup) -> Result<Self, Failure> {
        let mut servers = Vec::with_capacity(setup.token_files.len());
        for token_file in &setup.token_files {
            let connection =
                Connection { socket: setup.socket.clone(), address: setup.address, token_file: token_file.clone() };
            let attach = Attach {
                group: format!("replay-{:016x}-{}", setup.generation, setup.client),
                member: "tender replay".to_owned(),
                namespace: namespace(setup.generation, setup.block_tokens),
                layout: BlockLayout::opaque(setup.block_bytes),
            };
            servers.push(Server::new(attach_patiently(&connection, attach, &setup).await?, setup.generation));
        }
        Ok(Self { servers, turns: Semaphore::new(setup.requests_at_once.max(1)), block_tokens: setup.block_tokens })
    }

    async fn session(self: Arc<Self>, job: SessionJob, to_parent: Answers) {
        let began = Instant::now();
        let Some(server) = self.servers.get(job.tenant) else {
            return say(&to_parent, FromClient::Failed(format!("there is no tenant {}", job.tenant)));
        };
        let file = job.file.clone();
        let session = match tokio::task::spawn_blocking(move || session_json::read(&file)).await {
            Ok(Ok(session)) => session,
            Ok(Err(error)) => return say(&to_parent, FromClient::Failed(error.to_string())),
            Err(error) => return say(&to_parent, FromClient::Failed(error.to_string())),
        };
        let mut running = RunningSession::new(session, job.requests_max, server);
        running.skip(job.requests_done);
        let time_max = job.time_max_ms.map(Duration::from_millis);
        while time_max.is_none_or(|time_max| began.elapsed() < time_max) {
            let Some((served, late)) = running.step(server, &self.turns, began, job.pace).await else { break };
            say(&to_parent, answer(job.job, server, served, late.as_millis() as u64));
        }
        say(&to_parent, FromClient::Done(job.job));
    }

    async fn request(self: Arc<Self>, job: RequestJob, to_parent: Answers) {
        let Some(server) = self.servers.get(job.tenant) else {
            return say(&to_parent, FromClient::Failed(format!("there is no tenant {}", job.tenant)));
        };
        let keys = keys_of(&server.store().terms().root, "", self.block_tokens, &job.hash_ids);
        say(&to_parent, answer(job.job, server, server.serve(&keys, job.input_tokens).await, 0));
        say(&to_parent, FromClient::Done(job.job));
    }
}

/// Attaches; where nobody answers, again and again while there is patience.
async fn attach_patiently(connection: &Connection, attach: Attach, setup: &Setup) -> Result<Remote, Failure> {
    let began = Instant::now();
    loop {
        match connection.attach_as(attach.clone(), setup.door).await {
            Err(_) if began.elapsed() < Duration::from_millis(setup.patience_ms) => sleep(ATTACH_AGAIN_AFTER).await,
            attached => return attached,
        }
    }
}

fn answer(job: u64, server: &Server<Remote>, served: Served, late_ms: u64) -> FromClient {
    let Served { tally, get_us, wrong } = served;
    FromClient::Served { job, door: Door::of(server.store()), tally: Box::new(tally), get_us, late_ms, wrong }
}
