/** Words of the browser's notifications. */
import type { Words } from './type';

const en = {
  title: 'Notifications',
  text: 'The browser tells you when one of your trainings or batches ends, while this page is open in a tab, even behind others.',
  on: 'Tell me when a training or a batch ends',
  offer: 'Tell me when it ends',
  willTell: 'The browser tells you when it ends.',
  denied:
    'This browser does not let the page notify you. Allow it in the settings of the site, beside the address, then switch it on here.',
  unsupported: 'This browser, or an address without https, has no notifications. A webhook tells a program instead.',
  succeeded: '“{{name}}” is ready',
  failed: '“{{name}}” has failed',
  completed: '“{{name}}” is answered',
  expired: '“{{name}}” ran out of time',
  cancelled: '“{{name}}” was cancelled',
  training: 'Training on {{model}}',
  batch: 'Batch for {{model}}',
};

const ko: Words<typeof en> = {
  title: '알림',
  text: '이 페이지가 탭에 열려 있는 동안 학습이나 배치가 끝나면 브라우저가 알려 줍니다. 다른 탭을 보고 있어도 됩니다.',
  on: '학습이나 배치가 끝나면 알려 주기',
  offer: '끝나면 알려 주기',
  willTell: '끝나면 브라우저가 알려 줍니다.',
  denied: '이 브라우저가 알림을 막고 있습니다. 주소 옆의 사이트 설정에서 허용한 다음 여기에서 켜세요.',
  unsupported: '이 브라우저, 또는 https가 아닌 주소에는 알림이 없습니다. 대신 웹훅으로 프로그램에 알릴 수 있습니다.',
  succeeded: '‘{{name}}’ 학습이 끝났습니다',
  failed: '‘{{name}}’ 작업이 실패했습니다',
  completed: '‘{{name}}’ 배치가 끝났습니다',
  expired: '‘{{name}}’ 배치의 기한이 지났습니다',
  cancelled: '‘{{name}}’ 작업을 취소했습니다',
  training: '{{model}} 학습',
  batch: '{{model}} 배치',
};

export const notify = { en, ko };
