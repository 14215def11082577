//! A command line said again, for a `meshctl` elsewhere.
//!
//! Promises that what was given, by flags or by the environment, is given again, and nothing else. Never repeats what says
//! where an agent is. Tested below.

use clap::{ArgMatches, Command, parser::ValueSource};

/// The words of a command line that was read, without the arguments of these names.
pub(super) fn again(command: &Command, matches: &ArgMatches, without: &[&str]) -> Vec<String> {
    let mut words = Vec::new();
    for argument in command.get_arguments() {
        let id = argument.get_id().as_str();
        let source = matches.value_source(id);
        if without.contains(&id) || source.is_none_or(|source| source == ValueSource::DefaultValue) {
            continue;
        }
        let flag = argument.get_long().map(|long| format!("--{long}"));
        if !argument.get_action().takes_values() {
            words.extend(flag);
            continue;
        }
        let values = matches.get_raw(id).into_iter().flatten().map(|value| value.to_string_lossy());
        words.extend(values.map(|value| match &flag {
            Some(flag) => format!("{flag}={value}"),
            None => value.into_owned(),
        }));
    }
    if let Some((name, inner)) = matches.subcommand() {
        words.push(name.to_owned());
        words.extend(command.find_subcommand(name).into_iter().flat_map(|one| again(one, inner, without)));
    }
    words
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use super::super::Cli;

    #[test]
    fn what_was_said_is_said_again_without_where() -> Result<()> {
        for (said, again) in [
            ("status", "status"),
            ("status --output json", "--output=json status"),
            ("-o yaml config", "--output=yaml config"),
            ("config endpoints reviews", "config endpoints reviews"),
            ("maps dump PODS --node a", "maps dump PODS"),
            ("--kubeconfig f --context c --mesh-namespace m certs", "certs"),
            ("flows -f -n shop --pod web", "--pod=web flows --follow --namespace=shop"),
            ("--run-dir r --admin unix:/a --bpf-dir b status", "status"),
        ] {
            let cli = Cli::read(["meshctl"].into_iter().chain(said.split(' ')))?;
            assert_eq!(cli.said.join(" "), again, "{said}");
        }
        Ok(())
    }
}
