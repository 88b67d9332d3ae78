"""A hook of mkdocs: `guide/commands.md` is made from the options of the commands, so it cannot be out of date.

`python docs/hooks.py` prints the page.
"""

from collections.abc import Mapping
from typing import Any

PAGE = "guide/commands.md"
HEAD = """# Commands

Made from the options that the commands take. A recipe is a YAML file of them, `--recipe FILE`, and flags override it.
An option of a section is reached by a point, `--checkpoint.every 500`; in a recipe the section is a mapping,
`checkpoint: {every: 500}`. Flags may be written with dashes.

All commands take `--help`, `-q` to log warnings alone and `-v` to log more. Those with a recipe take `--print_config`,
which prints all options as a recipe, and `--print_schema`, which prints a JSON schema for editors.
"""
RUN, TRAIN = "run", "train"


def on_files(files: Any, config: Any) -> Any:
    """Add the page to those of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=command_reference()))
    return files


def command_reference() -> str:
    """All commands with their options, as a page of Markdown."""
    from being_vl.commands import COMMANDS

    parts = [HEAD]
    for name, command in COMMANDS.items():
        parts.append(command_section(name, command))
        if name == TRAIN:
            from being_vl.training.options import LoraOptions, StageOptions

            parts += [
                options_section("A stage", StageOptions),
                options_section("Adapters of a stage", LoraOptions),
            ]
    return "\n".join(parts)


def command_section(name: str, command: Any) -> str:
    """One command: what it does, how it is called, and a table of its options."""
    from being_vl.commands import COMMANDS, load
    from being_vl.flags import REST
    from being_vl.schema import read_options

    kind = load(command.options)
    place = f" {command.positional_option.upper()}" if command.positional_option else ""
    lines = [f"## being-vl {name} {{ #{anchor(name)} }}", "", command.text, ""]
    options = read_options(kind)
    rest = " [-- OPTIONS OF THE TRAINING]" if options.pop(REST, None) else ""
    lines += ["```text", f"being-vl {name}{place} [OPTIONS]{rest}", "```", ""]
    if name == RUN:
        sections = {
            key: type_name(option.hint) for key, option in options.items() if option.options is not None
        }
        options = {key: option for key, option in options.items() if option.options is None}
        links = [
            f"`--{key}.…` those of [`{command_name}`](#{anchor(command_name)})"
            for key, command_name in commands_by_options(sections).items()
        ]
        lines += ["Each step has a section of its own options: " + ", ".join(links) + ".", ""]
    if (
        name != TRAIN
        and (train_options := read_options(load(COMMANDS[TRAIN].options))).keys() <= options.keys()
    ):
        options = {key: option for key, option in options.items() if key not in train_options}
        lines += [f"Besides its own options it takes all of [`{TRAIN}`](#{TRAIN}).", ""]
    if command.dry_run:
        lines += ["`--dry_run` checks and plans everything, and writes nothing.", ""]
    return "\n".join([*lines, table(options, "--", command.positional_option), ""])


def commands_by_options(sections: Mapping[str, str]) -> dict[str, str]:
    """Section of a run → the command that has the same options."""
    from being_vl.commands import COMMANDS

    commands_of_classes = {command.options.rpartition(":")[2]: name for name, command in COMMANDS.items()}
    return {key: commands_of_classes[options] for key, options in sections.items()}


def type_name(hint: Any) -> str:
    """Name of a class."""
    return str(hint.__name__)


def options_section(title: str, kind: Any) -> str:
    """The table of an options dataclass that is an item of a list in a recipe, such as a stage."""
    from being_vl.schema import read_options

    return f"### {title} {{ #{anchor(kind.__name__)} }}\n\n{table(read_options(kind), '')}\n"


def table(options: Mapping[str, Any], prefix: str, positional_option: str | None = None) -> str:
    """Name, default and help of each option; those of a section below one another."""
    from being_vl.schema import walk

    lines = ["| option | default | |", "|---|---|---|"]
    for name, option in walk(options):
        word = f"`{name.upper()}`" if name == positional_option else f"`{prefix}{name}`"
        if option.alias:
            word += f", `{option.alias}`"
        lines.append(f"| {word} | {show_default(option)} | {option.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def show_default(option: Any) -> str:
    """A default as YAML has it; nothing for None and for long lists, and a word for what must be given."""
    from being_vl.schema import NO_DEFAULT, show_value

    if option.default is NO_DEFAULT:
        return "*required*"
    if option.default in (None, "", [], {}):
        return ""
    if isinstance(option.default, list | tuple):
        words = [getattr(item, "name", item) for item in option.default]
        return "`" + " ".join(map(str, words)) + "`"
    return f"`{option.default if isinstance(option.default, str) else show_value(option.default)}`"


def anchor(name: str) -> str:
    """The part of an address behind `#`."""
    return name.replace(" ", "-").lower()


if __name__ == "__main__":
    print(command_reference())
