import { expect, it } from 'vitest';
import { reportOf } from './report';

it('takes the lines of a refused file apart', () => {
  expect(
    reportOf(
      "7 of 9 lines can't be used: line 2: not JSON: Expecting value: line 1 column 1 (char 0); line 3: 'text' must be a string; and 5 more",
    ),
  ).toEqual({
    summary: "7 of 9 lines can't be used",
    lines: [
      { line: 2, message: 'not JSON: Expecting value: line 1 column 1 (char 0)' },
      { line: 3, message: "'text' must be a string" },
    ],
    more: 'and 5 more',
  });
});

it('leaves a message without lines as it is', () => {
  expect(reportOf('the file has no rows: each line is …').lines).toEqual([]);
});
