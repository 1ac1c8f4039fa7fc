//! A client without manners: sends whatever message it is given, through the generated code alone.

use std::fmt::Debug;
use std::net::SocketAddr;
use std::path::Path;

use tender_client::proto::wire::blocks_client::BlocksClient;
use tender_client::proto::wire::{self, put_reply, put_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

pub type Blocks = BlocksClient<Channel>;

pub async fn over_unix(socket: &Path) -> Blocks {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    blocks(endpoint.connect().await.unwrap())
}

pub async fn over_tcp(address: SocketAddr) -> Blocks {
    blocks(Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap())
}

fn blocks(channel: Channel) -> Blocks {
    BlocksClient::new(channel).max_decoding_message_size(64 << 20).max_encoding_message_size(64 << 20)
}

/// A request that shows this as its authorization.
pub fn authorized<T>(message: T, authorization: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    request
}

/// An attach that nothing is wrong with: blocks of 4 tokens.
pub fn attach_request(model: &str, block_bytes: u64) -> wire::AttachRequest {
    wire::AttachRequest {
        protocol_version: 1,
        group: model.to_owned(),
        member: "test".to_owned(),
        namespace: Some(wire::Namespace {
            model: model.to_owned(),
            kv_dtype: "bf16".to_owned(),
            block_tokens: 4,
            ..Default::default()
        }),
        layout: Some(wire::Layout {
            form: Some(wire::layout::Form::Opaque(wire::OpaqueForm { block_bytes })),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Insists that a request is refused with this code, in words that say all of `says`.
pub fn refused<T: Debug>(answer: Result<T, Status>, code: Code, says: &[&str]) {
    let status = answer.expect_err(&format!("it was to be refused: {says:?}"));
    assert_eq!(status.code(), code, "{}", status.message());
    for words in says {
        assert!(status.message().contains(words), "`{words}` is not in `{}`", status.message());
    }
}

pub fn header(header: wire::PutHeader) -> wire::PutRequest {
    wire::PutRequest { part: Some(put_request::Part::Header(header)) }
}

pub fn chunk(block: u32, offset_bytes: u64, data: Vec<u8>) -> wire::PutRequest {
    wire::PutRequest { part: Some(put_request::Part::Chunk(wire::PutChunk { block, offset_bytes, data: data.into() })) }
}

/// Sends all of a put and its half-close; the outcomes that the daemon told, first and last.
pub async fn put(blocks: &mut Blocks, parts: Vec<wire::PutRequest>) -> Result<Vec<Vec<wire::PutOutcome>>, Status> {
    let mut replies = blocks.put(tokio_stream::iter(parts)).await?.into_inner();
    let mut told = Vec::new();
    while let Some(reply) = replies.message().await? {
        told.push(outcomes(&reply));
    }
    Ok(told)
}

pub fn outcomes(reply: &wire::PutReply) -> Vec<wire::PutOutcome> {
    let (put_reply::Part::Reserved(told) | put_reply::Part::Committed(told)) = reply.part.as_ref().unwrap();
    told.outcomes().collect()
}

/// A put whose header was answered and whose bytes are still to come.
pub struct OpenPut {
    pub parts: mpsc::Sender<wire::PutRequest>,
    pub replies: Streaming<wire::PutReply>,
    pub reserved: Vec<wire::PutOutcome>,
}

impl OpenPut {
    pub async fn begin(blocks: &mut Blocks, first: wire::PutHeader) -> Self {
        let (parts, receiver) = mpsc::channel(16);
        parts.send(header(first)).await.unwrap();
        let mut replies = blocks.put(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        let reserved = outcomes(&replies.message().await.unwrap().unwrap());
        Self { parts, replies, reserved }
    }

    /// Half-close: what was committed.
    pub async fn commit(mut self) -> Vec<wire::PutOutcome> {
        drop(self.parts);
        outcomes(&self.replies.message().await.unwrap().unwrap())
    }
}

/// All messages of a stream, or the error that ends it.
pub async fn all<T>(answer: Result<Response<Streaming<T>>, Status>) -> Result<Vec<T>, Status> {
    let mut stream = answer?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}
