//! Which blocks: namespace, layout and tokens as flags.

use std::path::PathBuf;

use clap::Args;
use tender_client::proto::{BlockLayout, Namespace};

use crate::failure::Failure;
use crate::units::parse_bytes;

/// Flags that say whose blocks are meant.
#[derive(Args, Clone, Debug)]
pub struct NamespaceArgs {
    /// Name of the model
    #[arg(long)]
    pub model: String,
    /// Revision of the model
    #[arg(long, default_value = "")]
    pub revision: String,
    /// Element type of the KV: f32, f16, bf16, f8_e4m3, f8_e5m2, i8 or u8
    #[arg(long, default_value = "bf16")]
    pub dtype: String,
    /// Tokens per block
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub block_tokens: u32,
    /// Adapter (LoRA) with its revision
    #[arg(long, default_value = "")]
    pub adapter: String,
    /// Bytes of one block, which Tender does not look into
    #[arg(long, default_value = "64KiB", value_parser = parse_bytes, value_name = "SIZE")]
    pub block_bytes: u64,
}

impl NamespaceArgs {
    /// The root of all keys.
    pub fn namespace(&self) -> Namespace {
        Namespace {
            revision: self.revision.clone(),
            adapter: self.adapter.clone(),
            ..Namespace::text(&self.model, &self.dtype, self.block_tokens)
        }
    }

    /// What a block's bytes are.
    pub fn layout(&self) -> BlockLayout {
        BlockLayout::opaque(self.block_bytes)
    }
}

/// Flags that give a prompt's tokens.
#[derive(Args, Clone, Debug)]
#[group(multiple = false)]
pub struct TokensArgs {
    /// Tokens, with spaces or commas between them
    #[arg(long, value_name = "\"1 2 3\"")]
    pub tokens: Option<String>,
    /// File of tokens: numbers with spaces or line ends between them, or a JSON array
    #[arg(long, value_name = "FILE")]
    pub tokens_file: Option<PathBuf>,
    /// Text, each byte of which is taken as a token
    #[arg(long)]
    pub text: Option<String>,
}

impl TokensArgs {
    /// The tokens; there is at least one whole block of them.
    pub fn read(&self, block_tokens: u32) -> Result<Vec<u32>, Failure> {
        let tokens = match (&self.tokens, &self.tokens_file, &self.text) {
            (Some(text), ..) => parse(text, "--tokens")?,
            (_, Some(file), _) => {
                let shown = file.display().to_string();
                let text = std::fs::read_to_string(file).map_err(Failure::of(format_args!("cannot read {shown}")))?;
                parse(&text, &shown)?
            }
            (.., Some(text)) => text.bytes().map(u32::from).collect(),
            _ => {
                return Err(Failure::message("which blocks? name their tokens with --tokens, --tokens-file or --text"));
            }
        };
        if tokens.len() < block_tokens as usize {
            let count = tokens.len();
            return Err(Failure::message(format_args!(
                "{count} tokens came, but a block has {block_tokens}: a block that is not full has no key; give more tokens or a \
                 smaller --block-tokens"
            )));
        }
        Ok(tokens)
    }
}

fn parse(text: &str, origin: &str) -> Result<Vec<u32>, Failure> {
    let list = text.trim().trim_start_matches('[').trim_end_matches(']');
    let words = list.split(|c: char| c.is_whitespace() || c == ',').filter(|word| !word.is_empty());
    words
        .enumerate()
        .map(|(i, word)| {
            word.parse().map_err(|_| {
                Failure::message(format_args!(
                    "{origin}: token {i} is `{word}`, but must be a whole number from 0 to 4294967295"
                ))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_numbers_with_anything_usual_between_them() {
        for text in ["1 2 3", "[1,2,3]", "1,\n2,\n3\n", " [ 1 , 2 , 3 ]\n"] {
            assert_eq!(parse(text, "test").unwrap(), [1, 2, 3], "{text}");
        }
        let Err(Failure::Message(text)) = parse("1 x", "FILE") else { panic!("x is no token") };
        assert!(text.contains("FILE") && text.contains("token 1 is `x`"));
    }
}
