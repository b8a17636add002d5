"""How the console looks."""

STYLE = """
Screen { layout: vertical; }
#header { height: 3; }
#fleet { height: 12; }
#strip { height: 2; }
#bottom { height: 1fr; }
#queues { width: 34%; max-width: 56; }
#events { width: 1fr; }
#filter { height: 1; border: none; padding: 0 1; }
#keys { height: 1; }
.zoomed #bottom { height: 1fr; }
.zoomed #queues { width: 1fr; max-width: 100%; }

ModalScreen { align: center middle; }
ModalScreen .dialog {
  width: 90%; max-width: 100; height: auto; max-height: 90%;
  border: round $primary; padding: 0 1; background: $surface;
}
TextScreen .dialog, ChoiceDialog.wide .dialog { width: 100%; height: 100%; max-height: 100%; max-width: 160; }
ModalScreen .heading { text-style: bold; height: auto; }
ModalScreen .words { height: auto; margin-top: 1; }
ModalScreen .hint { color: $text-muted; height: 1; margin-top: 1; }
ModalScreen OptionList {
  height: auto; max-height: 1fr; border: none; margin-top: 1; padding: 0; background: $surface;
  text-wrap: nowrap; text-overflow: ellipsis;
}
ChoiceDialog.wide OptionList { height: 1fr; }
TextScreen VerticalScroll { height: 1fr; margin-top: 1; overflow-y: scroll; }
TextScreen #text { width: 100%; height: auto; text-wrap: nowrap; text-overflow: ellipsis; }
TextScreen VerticalScroll, ChoiceDialog OptionList { scrollbar-size-vertical: 1; }
Toast { max-width: 90%; }
"""
