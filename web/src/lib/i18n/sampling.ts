/** Words of what is folded away about sampling. */
import type { Words } from './type';

const en = {
  more: 'More sampling',
  seed: 'Seed',
  seedText: 'The same seed draws the same words.',
  seedAny: 'another one each time',
  stop: 'Stop strings',
  stopText: 'The answer ends before any of these; up to four.',
  topK: 'Top-k',
  topKText: 'Only so many of the likeliest words are drawn from; 0 for all.',
  minP: 'Min-p',
  minPText: 'Words less likely than this share of the likeliest are left out.',
  repetition: 'Repetition penalty',
  repetitionText: 'Above 1, words of the prompt and the answer become less likely.',
  presence: 'Presence penalty',
  presenceText: 'Above 0, words that the answer has used become less likely.',
  frequency: 'Frequency penalty',
  frequencyText: 'The same, for each time a word was used.',
  deterministic: 'Repeatable',
  deterministicText: 'Runs by itself, so that a seed repeats to the letter, whatever others ask.',
};

const ko: Words<typeof en> = {
  more: '샘플링 더 보기',
  seed: '시드',
  seedText: '시드가 같으면 같은 단어가 나옵니다.',
  seedAny: '매번 새로',
  stop: '멈춤 문자열',
  stopText: '이 중 하나가 나오기 전에 답이 끝납니다. 네 개까지 넣을 수 있습니다.',
  topK: 'Top-k',
  topKText: '가장 유력한 단어 몇 개에서만 고릅니다. 0이면 모두입니다.',
  minP: 'Min-p',
  minPText: '가장 유력한 단어의 이 비율보다 낮은 단어는 뺍니다.',
  repetition: '반복 벌점',
  repetitionText: '1보다 크면 프롬프트와 답에 나온 단어가 덜 나옵니다.',
  presence: '출현 벌점',
  presenceText: '0보다 크면 답에 이미 쓴 단어가 덜 나옵니다.',
  frequency: '빈도 벌점',
  frequencyText: '단어를 쓴 횟수만큼 덜 나옵니다.',
  deterministic: '똑같이 되풀이',
  deterministicText: '혼자 실행하므로, 다른 요청과 상관없이 시드가 글자까지 똑같이 되풀이됩니다.',
};

export const sampling = { en, ko };
