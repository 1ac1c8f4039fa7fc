//! Compiles `kvstore.proto` with `protox`, a protobuf compiler in Rust, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=kvstore.proto");
    let descriptors = protox::compile(["kvstore.proto"], ["."])?;
    tonic_prost_build::configure().bytes(".tender.v1").compile_fds(descriptors)?;
    Ok(())
}
