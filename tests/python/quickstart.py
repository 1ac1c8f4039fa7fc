"""Puts the KV of a prompt into a Tender daemon and gets it back: quickstart.py SOCKET

pip install grpcio grpcio-tools blake3
"""

import os
import queue
import struct
import sys
from pathlib import Path

import grpc
from blake3 import blake3

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "proto"))
wire, services = grpc.protos_and_services("kvstore.proto")

BLOCK_TOKENS, BLOCK_BYTES, CHUNK_BYTES = 16, 1 << 20, 1 << 18


def chain(parent, tokens):
    """Keys of all whole blocks: key(block i) = keyed BLAKE3(key(block i - 1), its tokens as u32 LE)."""
    keys = []
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = blake3(struct.pack(f"<{BLOCK_TOKENS}I", *tokens[start : start + BLOCK_TOKENS]), key=parent).digest()
        keys.append(parent)
    return keys


def put(store, header, payloads):
    """Sends the bytes of the blocks that the daemon wants; returns what became of each."""
    requests = queue.SimpleQueue()
    replies = store.Put(iter(requests.get, None))
    requests.put(wire.PutRequest(header=header))
    for block, outcome in enumerate(next(replies).reserved.outcomes):
        for start in range(0, BLOCK_BYTES, CHUNK_BYTES) if outcome == wire.PUT_ACCEPTED else ():
            data = payloads[block][start : start + CHUNK_BYTES]
            requests.put(wire.PutRequest(chunk=wire.PutChunk(block=block, offset_bytes=start, data=data)))
    requests.put(None)
    return list(next(replies).committed.outcomes)


def get(store, request):
    """The longest run of blocks from the first on."""
    blocks = []
    for reply in store.Get(request):
        if reply.HasField("block"):
            blocks.append(bytearray())
        elif reply.HasField("data"):
            blocks[-1] += reply.data
        else:
            return blocks[: reply.end.blocks]
    return []


# Without a name of its own grpcio sends the socket's path as the host, which HTTP/2 servers refuse (a reset stream).
options = [("grpc.default_authority", "localhost")]
with grpc.insecure_channel(f"unix:{os.path.abspath(sys.argv[1])}", options) as channel:
    store = services.BlocksStub(channel)
    attached = store.Attach(
        wire.AttachRequest(
            protocol_version=1,
            group="quickstart.py",
            namespace=wire.Namespace(model="my-python-model", kv_dtype="bf16", block_tokens=BLOCK_TOKENS),
            layout=wire.Layout(opaque=wire.OpaqueForm(block_bytes=BLOCK_BYTES)),
        ),
        timeout=5,
    )
    prompt = list(range(64))
    keys = chain(attached.root, prompt)
    payloads = [bytes([block]) * BLOCK_BYTES for block in range(1, len(keys) + 1)]
    run = {"attachment": attached.attachment, "keys": b"".join(keys)}
    had = store.Lookup(wire.LookupRequest(**run), timeout=5).prefix_blocks
    outcomes = put(store, wire.PutHeader(**run, parent=attached.root, tokens=prompt), payloads)
    right = get(store, wire.GetRequest(**run)) == payloads
    print(f"{len(keys)} blocks: {had} were there before, {'all' if right else 'not all'} came back right")
    sys.exit(0 if right and set(outcomes) <= {wire.PUT_STORED, wire.PUT_ALREADY_PRESENT} else 1)
