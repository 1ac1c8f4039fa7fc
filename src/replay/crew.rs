//! The client processes of a replay. One that was killed on purpose has a successor, which does again what it left undone.

use std::collections::{BTreeMap, VecDeque};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::process::child;
use super::protocol::{FromClient, SessionJob, Setup, ToClient};
use crate::failure::Failure;

/// How long the successor of a killed client looks for a daemon, whose worker may be starting.
const PATIENCE_MS: u64 = 20_000;

/// How long the end of a client that takes no more jobs may be on its way here.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// What a client process said, or how it ended.
type Words = Result<FromClient, String>;

/// What is heard of a crew.
#[derive(Debug)]
pub enum Heard {
    /// A client's answer.
    Answer(FromClient),
    /// This client was killed on purpose, and is dead: all that it said has been heard.
    Killed(usize),
}

/// The client processes.
#[derive(Debug)]
pub struct Crew {
    clients: Vec<Client>,
    tell: mpsc::Sender<(usize, Words)>,
    heard: mpsc::Receiver<(usize, Words)>,
    /// When all were set up: from then on a job's time counts, whoever does it.
    began: Instant,
    /// What was heard while the end of a client was awaited.
    early: VecDeque<Heard>,
}

#[derive(Debug)]
struct Client {
    input: ChildStdin,
    /// Until it was killed.
    kill: Option<oneshot::Sender<()>>,
    setup: Option<Setup>,
    /// By name, what it has not done yet.
    jobs: BTreeMap<u64, ToClient>,
}

impl Crew {
    /// Starts client processes.
    pub fn start(clients: usize) -> Result<Self, Failure> {
        // Full when the parent falls behind; the clients' pipes then fill, and they wait.
        let (tell, heard) = mpsc::channel(1024);
        let clients = (0..clients).map(|client| Client::start(client, &tell)).collect::<Result<_, _>>()?;
        Ok(Self { clients, tell, heard, began: Instant::now(), early: VecDeque::new() })
    }

    /// Has all clients attach. `setup` is for the first; the others differ in their index.
    pub async fn set_up(&mut self, setup: &Setup) -> Result<(), Failure> {
        let requests_at_once = setup.requests_at_once.div_ceil(self.clients.len());
        for index in 0..self.clients.len() {
            let setup = Setup { client: index, requests_at_once, ..setup.clone() };
            self.clients[index].setup = Some(setup.clone());
            self.say(index, &ToClient::Setup(setup)).await?;
        }
        for _ in 0..self.clients.len() {
            // The first answers, since nobody has a job yet.
            self.hear().await?;
        }
        self.began = Instant::now();
        Ok(())
    }

    /// Gives a job to the client that has the fewest.
    pub async fn give(&mut self, job: ToClient) -> Result<(), Failure> {
        let alive = self.clients.iter().enumerate().filter(|(_, client)| client.kill.is_some());
        let Some((index, _)) = alive.min_by_key(|(_, client)| client.jobs.len()) else {
            // All were killed at once: the first one's successor will do it.
            self.clients[0].jobs.extend(job.name().map(|name| (name, job)));
            return Ok(());
        };
        self.clients[index].jobs.extend(job.name().map(|name| (name, job.clone())));
        self.say(index, &job.after(self.began.elapsed())).await
    }

    /// Jobs that are not done yet.
    pub fn jobs_out(&self) -> usize {
        self.clients.iter().map(|client| client.jobs.len()).sum()
    }

    /// Kills a client that lives, with kill -9: the one after the `choice`-th that has work, or any. Tells whether there was one.
    pub fn kill(&mut self, choice: usize) -> bool {
        let mut alive: Vec<&mut Client> = self.clients.iter_mut().filter(|client| client.kill.is_some()).collect();
        if alive.iter().any(|client| !client.jobs.is_empty()) {
            alive.retain(|client| !client.jobs.is_empty());
        }
        let count = alive.len().max(1);
        // Who listens to it is gone only when it is.
        alive.get_mut(choice % count).and_then(|client| client.kill.take()).is_some_and(|kill| kill.send(()).is_ok())
    }

    /// Starts the successor of a client that was killed. What was under way is asked again, what was answered is not.
    pub async fn succeed(&mut self, index: usize) -> Result<(), Failure> {
        let successor = Client::start(index, &self.tell)?;
        self.hand_over(index, successor).await
    }

    async fn hand_over(&mut self, index: usize, mut successor: Client) -> Result<(), Failure> {
        successor.jobs = std::mem::take(&mut self.clients[index].jobs);
        successor.setup = self.clients[index].setup.take().map(|setup| Setup { patience_ms: PATIENCE_MS, ..setup });
        let (setup, jobs) = (successor.setup.clone(), successor.jobs.clone());
        self.clients[index] = successor;
        for message in setup.map(ToClient::Setup).into_iter().chain(jobs.into_values()) {
            self.say(index, &message.after(self.began.elapsed())).await?;
        }
        Ok(())
    }

    /// What is heard next; a client that gives up, or is gone without having been killed on purpose, is a failure.
    pub async fn hear(&mut self) -> Result<Heard, Failure> {
        match self.early.pop_front() {
            Some(heard) => Ok(heard),
            None => self.listen().await,
        }
    }

    /// Tells a client something. Of one that has ended, the pipe may break before its end is heard, which tells more.
    async fn say(&mut self, index: usize, message: &ToClient) -> Result<(), Failure> {
        let Err(deaf) = self.clients[index].say(index, message).await else { return Ok(()) };
        let deadline = Instant::now() + END_PATIENCE;
        while let Ok(heard) = timeout_at(deadline, self.listen()).await {
            let heard = heard?;
            let is_killed = matches!(heard, Heard::Killed(client) if client == index);
            self.early.push_back(heard);
            if is_killed {
                // Its successor is told of this job too.
                return Ok(());
            }
        }
        Err(deaf)
    }

    /// As [`Self::hear`], of what was not heard yet.
    async fn listen(&mut self) -> Result<Heard, Failure> {
        match self.heard.recv().await {
            Some((client, Ok(FromClient::Failed(why)))) => {
                Err(Failure::message(format_args!("client process {client}: {why}")))
            }
            Some((client, Ok(answer))) => {
                let jobs = &mut self.clients[client].jobs;
                match &answer {
                    // Killed between this answer and `Done`, it would be asked a second time.
                    FromClient::Served { job, .. } if jobs.get_mut(job).is_some_and(ToClient::is_done_with_one) => {
                        jobs.remove(job);
                    }
                    FromClient::Done(job) => drop(jobs.remove(job)),
                    _ => {}
                }
                Ok(Heard::Answer(answer))
            }
            Some((client, Err(_))) if self.clients[client].kill.is_none() => Ok(Heard::Killed(client)),
            Some((client, Err(how))) => Err(Failure::message(format_args!("client process {client} died ({how})"))),
            None => Err(Failure::message("all client processes are gone")),
        }
    }
}

impl ToClient {
    /// The job's name.
    fn name(&self) -> Option<u64> {
        match self {
            Self::Setup(_) => None,
            Self::Session(job) => Some(job.job),
            Self::Request(job) => Some(job.job),
        }
    }

    /// Counts an answered request; whether it was all there is to the job. A session knows its end by itself.
    fn is_done_with_one(&mut self) -> bool {
        match self {
            Self::Session(job) => {
                job.requests_done += 1;
                false
            }
            Self::Setup(_) | Self::Request(_) => true,
        }
    }

    /// What is left of a job when so much of its time is gone.
    fn after(mut self, gone: Duration) -> Self {
        if let Self::Session(SessionJob { time_max_ms: Some(left_ms), .. }) = &mut self {
            *left_ms = left_ms.saturating_sub(gone.as_millis() as u64);
        }
        self
    }
}

impl Client {
    fn start(index: usize, tell: &mpsc::Sender<(usize, Words)>) -> Result<Self, Failure> {
        let mut command = child("replay-client")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(Failure::of("cannot start a client process"))?;
        let input = child.stdin.take().ok_or_else(|| Failure::message("a client process has no input"))?;
        let (kill, killed) = oneshot::channel();
        tokio::spawn(listen(index, child, tell.clone(), killed));
        Ok(Self { input, kill: Some(kill), setup: None, jobs: BTreeMap::new() })
    }

    async fn say(&mut self, index: usize, message: &ToClient) -> Result<(), Failure> {
        let line = serde_json::to_string(message).map_err(Failure::message)? + "\n";
        let written = self.input.write_all(line.as_bytes()).await;
        written.map_err(Failure::of(format_args!("client process {index} takes no more jobs")))
    }
}

/// Passes on what a client says, and its end. The child is killed when this task is dropped, which is when the replay ends.
async fn listen(index: usize, mut child: Child, tell: mpsc::Sender<(usize, Words)>, mut killed: oneshot::Receiver<()>) {
    let mut is_killed = false;
    if let Some(output) = child.stdout.take() {
        let mut lines = BufReader::new(output).lines();
        loop {
            let line = tokio::select! {
                line = lines.next_line() => line,
                order = &mut killed, if !is_killed => {
                    is_killed = true;
                    // Without an order the crew is gone.
                    if order.is_err() || child.start_kill().is_err() {
                        return;
                    }
                    continue;
                }
            };
            let Ok(Some(line)) = line else { break };
            let words = match serde_json::from_str(&line) {
                Ok(answer) => Ok(answer),
                // Cut off in the middle of a word.
                Err(_) if is_killed => break,
                Err(error) => Err(format!("it said something else than an answer: {error}")),
            };
            if tell.send((index, words)).await.is_err() {
                return;
            }
        }
    }
    let how = child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
    drop(tell.send((index, Err(how))).await);
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokio::io::Lines;
    use tokio::process::{ChildStdout, Command};

    use super::*;

    /// A client that says what it was told.
    fn echo() -> (Client, Lines<BufReader<ChildStdout>>, Child) {
        let mut echo = Command::new("cat");
        let mut echo = echo.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let (input, output) = (echo.stdin.take().unwrap(), echo.stdout.take().unwrap());
        let client = Client { input, kill: Some(oneshot::channel().0), setup: None, jobs: BTreeMap::new() };
        (client, BufReader::new(output).lines(), echo)
    }

    async fn time_max_ms(said: &mut Lines<BufReader<ChildStdout>>) -> Option<u64> {
        match serde_json::from_str(&said.next_line().await.unwrap().unwrap()).unwrap() {
            ToClient::Session(job) => job.time_max_ms,
            other => panic!("{other:?}"),
        }
    }

    fn session(job: u64, time_max_ms: Option<u64>) -> ToClient {
        let (file, requests_max) = (PathBuf::from("0.json"), usize::MAX);
        let tenant = 0;
        ToClient::Session(SessionJob { job, tenant, file, requests_max, requests_done: 0, time_max_ms, pace: None })
    }

    #[tokio::test]
    async fn a_successor_has_what_is_left_of_the_time() {
        let (client, mut said, _first) = echo();
        let (tell, heard) = mpsc::channel(1);
        let mut crew = Crew { clients: vec![client], tell, heard, began: Instant::now(), early: VecDeque::new() };
        crew.give(session(0, Some(28_000))).await.unwrap();
        assert!(time_max_ms(&mut said).await.is_some_and(|left| (15_001..=28_000).contains(&left)));
        for (gone, least, most) in [(13, 1, 15_000), (30, 0, 0)] {
            let (successor, mut said, _child) = echo();
            crew.began = Instant::now().checked_sub(Duration::from_secs(gone)).unwrap();
            crew.hand_over(0, successor).await.unwrap();
            let left = time_max_ms(&mut said).await;
            assert!(left.is_some_and(|left| (least..=most).contains(&left)), "{left:?} after {gone} s");
        }
        let (successor, mut said, _child) = echo();
        crew.clients[0].jobs = [(1, session(1, None))].into();
        crew.hand_over(0, successor).await.unwrap();
        assert_eq!(time_max_ms(&mut said).await, None);
    }
}
