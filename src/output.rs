//! Standard output: tables for people, or one JSON object per line. Everything else goes to standard error.

use std::fmt::Display;
use std::io::{self, Write as _};

use clap::Args;
use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, TableStyle};
use serde::Serialize;

use crate::failure::Failure;

/// Who reads the output.
#[derive(Args, Clone, Copy, Debug)]
pub struct Output {
    /// Print one JSON object per line instead of tables
    #[arg(long)]
    pub json: bool,
}

impl Output {
    /// Prints a line for people.
    pub fn line(self, text: impl Display) -> Result<(), Failure> {
        writeln!(io::stdout().lock(), "{text}").map_err(Failure::of_output)
    }

    /// Prints an object as a line of JSON.
    pub fn object(self, object: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(object).map_err(|error| Failure::of_output(error.into()))?;
        self.line(line)
    }
}

/// A table as wide as its content, its first column to the left and all others to the right.
pub fn table<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl IntoIterator<Item = [String; COLUMNS]>,
) -> String {
    let mut table = bare(header, rows);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table.trim_fmt() + "\n"
}

/// A table of text, all columns to the left, folded to fit the terminal.
pub fn text_table<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl IntoIterator<Item = [String; COLUMNS]>,
) -> String {
    let mut table = bare(header, rows);
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(TEXT_WIDTH);
    table.trim_fmt() + "\n"
}

/// Fits most terminals; comments fold.
const TEXT_WIDTH: u16 = 120;

/// A line under the header, and nothing else that a reader would have to look past.
const STYLE: TableStyle = TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

fn bare<const COLUMNS: usize>(header: [&str; COLUMNS], rows: impl IntoIterator<Item = [String; COLUMNS]>) -> Table {
    let mut table = Table::new();
    table.load_style(STYLE).set_header(header).add_rows(rows);
    table
}
