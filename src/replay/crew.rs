//! The client processes of a replay.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin};
use tokio::sync::mpsc;

use super::process::child;
use super::protocol::{FromClient, ToClient};
use crate::failure::Failure;

/// What a client process said, or how it ended.
type Heard = Result<FromClient, String>;

/// The client processes.
#[derive(Debug)]
pub struct Crew {
    inputs: Vec<ChildStdin>,
    /// Jobs that each has not done yet.
    pub jobs: Vec<usize>,
    heard: mpsc::Receiver<(usize, Heard)>,
}

impl Crew {
    /// Starts client processes.
    pub fn start(clients: usize) -> Result<Self, Failure> {
        // Full when the parent falls behind; the clients' pipes then fill, and they wait.
        let (tell, heard) = mpsc::channel(1024);
        let mut inputs = Vec::with_capacity(clients);
        for client in 0..clients {
            let mut command = child("replay-client")?;
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().map_err(Failure::of("cannot start a client process"))?;
            inputs.extend(child.stdin.take());
            tokio::spawn(listen(client, child, tell.clone()));
        }
        Ok(Self { jobs: vec![0; inputs.len()], inputs, heard })
    }

    /// Says something to one client.
    pub async fn say(&mut self, client: usize, message: &ToClient) -> Result<(), Failure> {
        let line = serde_json::to_string(message).map_err(Failure::message)? + "\n";
        let written = self.inputs[client].write_all(line.as_bytes()).await;
        written.map_err(Failure::of(format_args!("client process {client} takes no more jobs")))
    }

    /// Gives a job to the client that has the fewest.
    pub async fn give(&mut self, job: &ToClient) -> Result<(), Failure> {
        let idlest = (0..self.jobs.len()).min_by_key(|client| self.jobs[*client]).unwrap_or_default();
        self.jobs[idlest] += 1;
        self.say(idlest, job).await
    }

    /// Jobs that are not done yet.
    pub fn jobs_out(&self) -> usize {
        self.jobs.iter().sum()
    }

    /// The next answer of any client; a client that is gone or gives up is a failure.
    pub async fn answer(&mut self) -> Result<FromClient, Failure> {
        match self.heard.recv().await {
            Some((client, Ok(FromClient::Failed(why)))) => {
                Err(Failure::message(format_args!("client process {client}: {why}")))
            }
            Some((client, Ok(answer))) => {
                if matches!(answer, FromClient::Done) {
                    self.jobs[client] -= 1;
                }
                Ok(answer)
            }
            Some((client, Err(how))) => Err(Failure::message(format_args!("client process {client} died ({how})"))),
            None => Err(Failure::message("all client processes are gone")),
        }
    }
}

/// Passes on what a client says. The child is killed when this task is dropped, which is when the replay ends.
async fn listen(client: usize, mut child: Child, tell: mpsc::Sender<(usize, Heard)>) {
    if let Some(output) = child.stdout.take() {
        let mut lines = BufReader::new(output).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let heard =
                serde_json::from_str(&line).map_err(|error| format!("it said something else than an answer: {error}"));
            if tell.send((client, heard)).await.is_err() {
                return;
            }
        }
    }
    let how = child.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
    drop(tell.send((client, Err(how))).await);
}
