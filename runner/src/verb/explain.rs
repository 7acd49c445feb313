//! `explain`: what an error or warning code means and what to do. Works offline.

use serde::Serialize;

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
};

/// Options of `explain`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The code, like E_BLOCK_CORRUPT; without one, all are listed
    #[arg(value_name = "E_CODE")]
    pub code: Option<String>,
}

#[derive(Serialize)]
struct Explanation {
    code: &'static str,
    exit: u8,
    retryable: bool,
    text: &'static str,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let codes = match &args.code {
        None => Code::ALL.to_vec(),
        Some(name) => vec![Code::find(name).ok_or_else(|| unknown(name))?],
    };
    for code in &codes {
        let explanation =
            Explanation { code: code.name(), exit: code.exit(), retryable: code.retryable(), text: code.text() };
        context.out.record("code", &explanation);
        if args.code.is_none() {
            let first = code.text().split(". ").next().unwrap_or_default();
            context.out.line(format_args!("{:<20} {:>3}  {first}", code.name(), code.exit()));
        } else {
            let again = if code.retryable() { "yes" } else { "no" };
            context.out.line(format_args!("{} (exit code {}, retry may help: {again})", code.name(), code.exit()));
            context.out.line(code.text());
        }
    }
    Ok(())
}

fn unknown(name: &str) -> Fail {
    Fail::new(Code::NotFound, format!("there is no code `{name}`")).help("aquifer explain")
}
