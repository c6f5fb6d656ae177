//! The session that the command line promises, line by line, and the reference.

use clap::{CommandFactory, Parser, Subcommand};

use crate::args::{Format, VolumeCommand};
use crate::{Command, Global, reference};

/// As the binary flattens it.
#[derive(Debug, Parser)]
#[command(name = "oblak", disable_help_subcommand = true)]
struct Root {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Words,
}

#[derive(Debug, Subcommand)]
enum Words {
    /// Something of the binary.
    Up,
    #[command(flatten)]
    Client(Command),
}

fn parse(line: &str) -> Result<(Global, Command), clap::Error> {
    Root::try_parse_from(line.split_whitespace()).map(|root| match root.command {
        Words::Client(command) => (root.global, command),
        Words::Up => panic!("not a command of the client"),
    })
}

#[test]
fn every_line_of_the_session_is_understood() {
    for line in [
        "oblak image list",
        "oblak launch tiny --name web --isolation vm --key id.pub --wait",
        "oblak launch busybox --name job --isolation container --wait -- httpd -f -p 80 -h /",
        "oblak list",
        "oblak list -o json",
        "oblak list -o yaml",
        "oblak list -o table",
        "oblak list -o wide",
        "oblak list --watch",
        "oblak ssh web -- hostname",
        "oblak exec job -- ping -c1 web",
        "oblak logs web --follow",
        "oblak console web",
        "oblak exec -it job -- sh",
        "oblak volume create data --size 1GiB",
        "oblak volume attach data web",
        "oblak volume detach data",
        "oblak volume detach data web",
        "oblak stop web",
        "oblak start web",
        "oblak restart web",
        "oblak pause web",
        "oblak resume web",
        "oblak delete web",
        "oblak resize web --flavor m",
        "oblak snapshot web s1",
        "oblak restore web s1",
        "oblak apply -f stack.yaml",
        "oblak apply -f stack.yaml --plan",
        "oblak explain instance/big",
        "oblak node list",
        "oblak events",
        "oblak version",
        "oblak completion bash",
        "oblak completion zsh",
        "oblak completion fish",
        "oblak launch busybox --publish 8080:80",
        "oblak forward web 22 --stdio",
        "oblak whoami",
    ] {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn words_land_where_they_belong() {
    let (_, Command::Launch(launch)) =
        parse("oblak launch busybox --name job --isolation container --wait -- httpd -f -p 80 -h /").unwrap()
    else {
        panic!("launch")
    };
    assert_eq!(launch.command, ["httpd", "-f", "-p", "80", "-h", "/"]);
    assert!(launch.wait);
    let (_, Command::Exec(exec)) = parse("oblak exec -it job -- sh").unwrap() else { panic!("exec") };
    assert!(exec.interactive && exec.tty);
    assert_eq!(exec.command, ["sh"]);
    let (global, Command::List(_)) = parse("oblak list -o wide -p team").unwrap() else { panic!("list") };
    assert_eq!((global.output, global.project.as_deref()), (Some(Format::Wide), Some("team")));
    let (_, Command::Snapshot(snapshot)) = parse("oblak snapshot web s1 --no-memory").unwrap() else { panic!() };
    assert_eq!((snapshot.instance.as_str(), snapshot.name.as_str(), snapshot.no_memory), ("web", "s1", true));
    let (_, Command::Volume(VolumeCommand::Create(volume))) = parse("oblak volume create data --size 1GiB").unwrap()
    else {
        panic!("volume")
    };
    assert_eq!(volume.size, oblak_model::Size::gib(1));
}

#[test]
fn mistakes_are_usage_errors() {
    for line in [
        "oblak lst",
        "oblak launch",
        "oblak launch tiny --isolation jail",
        "oblak launch tiny --publish 80",
        "oblak launch tiny --disk big",
        "oblak exec job",
        "oblak exec job sh",
        "oblak delete",
        "oblak image create x",
        "oblak image create x --from-url https://a --from-file b",
        "oblak forward web 0",
        "oblak forward web 80 --stdio --listen 8080",
        "oblak volume create data",
        "oblak list --watch --all-projects",
        "oblak list -o xml",
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
    }
    let text = parse("oblak lst").unwrap_err().to_string();
    assert!(text.contains("list"), "{text}");
}

#[test]
fn the_command_line_is_sound() {
    Root::command().debug_assert();
}

#[test]
fn the_reference_names_everything_and_is_the_same_each_time() {
    let text = reference(&Root::command());
    assert_eq!(text, reference(&Root::command()));
    for needle in [
        "## oblak launch",
        "### oblak volume attach",
        "#### oblak security-group rule add",
        "| `-o, --output <FORMAT>` | How to print what was asked for. One of `table`, `wide`, `json`, `yaml`. |",
        "| `--publish <[ADDR:]HOST:PORT[/udp]>` | Lead a port of the host into it. May be given several times. |",
        "| `--flavor <NAME>` | Size; `oblak flavor list` shows them. Default: `s`. |",
        "| 4 | does not fit on any node |",
        "Environment: `OBLAK_SERVER`.",
        "## oblak up",
    ] {
        assert!(text.contains(needle), "{needle} is missing in\n{text}");
    }
    assert!(!text.contains("--help"));
}
