"""The words of the simulated tokenizer: common English, one token each."""

from __future__ import annotations

_TEXT = """
a about above across add after again age ago air all almost along also always among an and animal another
answer any appear are area ask at away back base be became because become bed been before began begin
behind being below best better between big bird black blue boat body book both bottom box boy bring
brought build building but by call came can car care carry case cause center certain change check
children city class clear close cold color come common complete could country course cover cross cut dark
day decide deep did differ direct distance do does dog done door down draw drive dry during each early
earth ease east easy eat end engine enough even evening ever every example explain eye face fact fall
family far farm fast father feel feet few field figure fill final find fine fire first fish five fly
follow food foot for force form found four free friend from front full game gave general get girl give go
gold good got govern great green ground group grow had half hand happen hard has have he head hear heard
heat heavy held help her here high him his hold home horse hot hour house how hundred idea if important
in inch interest into is island it judge just keep kind king knew know land language large last late
laugh lead learn leave left less let letter life light like line list listen little live long look lost
love low machine made main make man many map mark may me mean measure men might mile mind minute miss
money moon more morning most mother mountain move much music must my name nation near need never new next
night no north nose not note nothing notice noun now number object of off often old on once one only open
or order other our out over own page paper part pass pattern people perhaps person picture piece place
plain plan plane plant play point port pose possible power press problem produce product pull put
question quick rain ran reach read ready real record red remember rest right river road rock room round
rule run said same saw say school science sea second see seem self sentence serve set several shape she
ship short should show side simple since sing sit six size sleep slow small snow so some song soon sound
south space special spell stand star start state stay step still stood stop story street strong study
such sun sure surface system table tail take talk teach tell ten test than that the their them then there
these they thing think this those though thought thousand three through time to together told too took
top toward town travel tree true try turn two under unit until up us use usual very voice vowel wait walk
want war warm was watch water way we week weight well went were west what wheel when where which while
white who whole why will wind with without wonder wood word work world would write year yes yet you young
your
"""

COMMON_WORDS: tuple[str, ...] = tuple(_TEXT.split())
"""In the order of their token ids: any change but appending changes every answer."""
