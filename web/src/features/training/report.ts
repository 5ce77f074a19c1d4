/** The relay's report on a refused file, taken apart: "2 of 9 lines can't be used: line 3: …; line 7: …; and 4 more". */

export interface Report {
  summary: string;
  lines: { line: number; message: string }[];
  more: string;
}

export function reportOf(message: string): Report {
  const first = /(^|: )line \d+: /.exec(message);
  if (!first) return { summary: message, lines: [], more: '' };
  const start = first.index + (first[1]?.length ?? 0);
  const pieces = message.slice(start).split(/; (?=line \d+: |and \d+ more$)/);
  const more = pieces.at(-1)?.startsWith('and ') ? (pieces.pop() ?? '') : '';
  const lines = pieces.flatMap((piece) => {
    const match = /^line (\d+): (.*)$/s.exec(piece);
    return match ? [{ line: Number(match[1]), message: match[2] ?? '' }] : [];
  });
  return { summary: message.slice(0, first.index), lines, more };
}
