import { expect, it } from 'vitest';
import { namesOf, reportOf } from './report';

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

it('takes the report on a zip of pictures apart by names', () => {
  const message =
    'the zip has 7 errors (4 no_caption, 3 broken) beside 9 sound pictures: d/1.png: has no caption, and others have ' +
    'one; 2.jpg: is broken: send it anew; or leave it out; and 5 more';
  expect(namesOf(message)).toEqual({
    summary: 'the zip has 7 errors (4 no_caption, 3 broken) beside 9 sound pictures',
    files: [
      { name: 'd/1.png', message: 'has no caption, and others have one' },
      { name: '2.jpg', message: 'is broken: send it anew; or leave it out' },
    ],
    more: 'and 5 more',
  });
  expect(namesOf('2 of 9 lines can’t be used: line 3: no')).toBeNull();
});
