//! `marline completions` and `marline man`: made from the definition of the command line, so that they cannot differ from it.

use std::{fs, path::PathBuf, process::ExitCode};

use clap::Args;
use clap_complete::Shell;
use clap_mangen::Man;

use super::{command, failed, print};

#[derive(Args)]
#[command(after_long_help = "\
  marline completions bash > /etc/bash_completion.d/marline
  marline completions zsh > /usr/share/zsh/vendor-completions/_marline
  marline completions fish > ~/.config/fish/completions/marline.fish")]
pub(super) struct CompletionsArgs {
    shell: Shell,
}

#[derive(Args)]
#[command(after_long_help = "\
  marline man | man -l -
  marline man --dir /usr/local/share/man/man1")]
pub(super) struct ManArgs {
    /// Write the pages of this program and of each of its commands here
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(super) fn completions(args: &CompletionsArgs) -> ExitCode {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "marline", &mut text);
    print(&String::from_utf8_lossy(&text));
    ExitCode::SUCCESS
}

pub(super) fn man(args: &ManArgs) -> ExitCode {
    let command = command();
    let Some(dir) = &args.dir else {
        let mut text = Vec::new();
        return match Man::new(command).render(&mut text) {
            Ok(()) => {
                print(&String::from_utf8_lossy(&text));
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error.to_string()),
        };
    };
    let made = fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(command, dir));
    match made {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&format!("{}: {error}", dir.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_command_that_people_see_has_words_and_an_example() {
        let command = command();
        for one in command.get_subcommands().filter(|one| !one.is_hide_set()) {
            let name = one.get_name();
            assert!(one.get_about().is_some(), "{name} says nothing of itself");
            let example = one.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            assert!(example.contains(&format!("  marline {name}")), "{name} has no example: {example}");
        }
    }
}
