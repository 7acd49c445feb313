//! Asking before something is destroyed.
//!
//! Invariants
//! - What is lost is said before the question, in every form of output.
//! - Without `--yes` and without a terminal to ask on, nothing is done.

use std::io::{self, BufRead, IsTerminal};

use serde_json::json;

use crate::{
    cli::Confirm,
    context::Context,
    fail::{Code, Fail, Result},
    output::Form,
};

/// Says what is lost and asks for a `yes`.
///
/// # Errors
/// [`Code::Confirm`] where nobody said yes.
pub(crate) fn confirm(context: &Context, confirm: &Confirm, lost: &str) -> Result<()> {
    context.out.record("loss", &json!({ "what": lost }));
    context.out.say(lost);
    if confirm.yes {
        return Ok(());
    }
    if context.out.form() == Form::Json || !io::stdin().is_terminal() || !context.out.is_terminal() {
        return Err(Fail::new(Code::Confirm, "nobody confirmed it; nothing was changed").help("add --yes"));
    }
    context.out.say("Type yes to go on:");
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(|e| Fail::io("the terminal", "read", &e))?;
    if answer.trim() == "yes" {
        return Ok(());
    }
    Err(Fail::new(Code::Confirm, "it was not confirmed; nothing was changed"))
}
