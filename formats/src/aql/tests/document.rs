//! The drawn layout is the compiled one.

use std::{fmt::Write, path::Path};

use super::*;

fn tables() -> String {
    let mut out = String::new();
    for (name, size, fields) in layout::STRUCTS {
        writeln!(out, "### `{name}`, {size} bytes\n").expect("text");
        writeln!(out, "| offset | bytes | field | meaning |\n|---:|---:|---|---|").expect("text");
        for field in *fields {
            let (offset, bytes) = (field.offset, field.size);
            writeln!(out, "| {offset} | {bytes} | `{}` | {} |", field.name, field.about.trim()).expect("text");
        }
        out.push('\n');
    }
    out
}

#[test]
fn the_document_holds_the_tables_of_the_structs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/aql.md");
    let text = std::fs::read_to_string(&path).expect("docs/formats/aql.md");
    let (begin, end) = ("<!-- tables: begin -->\n\n", "<!-- tables: end -->");
    let body = text.split_once(begin).and_then(|(_, rest)| rest.split_once(end)).expect("the marks").0;
    assert!(body == tables(), "docs/formats/aql.md is stale; the tables should be:\n{}", tables());
}

#[test]
fn fields_lie_one_after_the_other_and_fill_their_struct() {
    for (name, size, fields) in layout::STRUCTS {
        let mut at = 0;
        for field in *fields {
            assert_eq!(field.offset, at, "{name}.{}", field.name);
            at += field.size;
        }
        assert_eq!(at, *size, "{name}");
    }
}
