/** Words of what was used this month. */
import type { Words } from './type';

const en = {
  title: 'Used this month',
  until: 'The month ends {{when}}.',
  tokens: 'Tokens',
  prompt: 'of prompts',
  completion: 'of answers',
  trained: 'of training',
  gpu: 'Training on GPUs',
  spend: 'Spent',
  byKey: 'By key',
  ofTokens: '{{used}} of {{limit}} tokens',
  tokensOnly: '{{used}} tokens',
  ofSpend: '{{used}} of {{limit}} spent',
  spendOnly: '{{used}} spent',
  revoked: 'revoked',
  full: 'used up',
  perMonth: 'Tokens a month',
  spendPerMonth: 'Money a month',
  perMonthText: 'Prompts, answers and training together. Empty: no end.',
  spendPerMonthText: 'At the prices of this relay. Empty: no end.',
  limitTokens: '{{amount}} tokens a month',
  limitSpend: '{{amount}} a month',
};

const ko: Words<typeof en> = {
  title: '이번 달 사용량',
  until: '이번 달은 {{when}} 끝납니다.',
  tokens: '토큰',
  prompt: '질문',
  completion: '답변',
  trained: '학습',
  gpu: 'GPU 학습 시간',
  spend: '쓴 돈',
  byKey: '키별',
  ofTokens: '{{limit}}토큰 가운데 {{used}} 사용',
  tokensOnly: '{{used}}토큰 사용',
  ofSpend: '{{limit}} 가운데 {{used}} 지출',
  spendOnly: '{{used}} 지출',
  revoked: '폐기됨',
  full: '다 썼음',
  perMonth: '한 달에 쓸 수 있는 토큰',
  spendPerMonth: '한 달에 쓸 수 있는 돈',
  perMonthText: '질문, 답변, 학습을 모두 더한 것입니다. 비워 두면 제한이 없습니다.',
  spendPerMonthText: '이 릴레이의 가격으로 셉니다. 비워 두면 제한이 없습니다.',
  limitTokens: '한 달에 {{amount}}토큰',
  limitSpend: '한 달에 {{amount}}',
};

export const usage = { en, ko };
